"""One simulated run: a setup, a system, a trace and a rate in; latency, batching and memory out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.paper.observers import BatchMeter, MemoryMeter, Window
from benchmarks.paper.replay import Replay, replay
from benchmarks.paper.setups import Setup, System, build_engine
from benchmarks.paper.traces import Lengths, TraceRequest, poisson_trace
from engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Workload:
    """What arrives, but for the rate.

    Attributes:
        num_shared: prefix tokens that all requests share, on top of their own prompts.
        num_sequences: outputs of a request: samples, or the beam's width.
        beam: beam search rather than samples.
    """

    name: str
    lengths: Lengths
    num_shared: int = 0
    num_sequences: int = 1
    beam: bool = False

    @property
    def description(self) -> str:
        shared = f", {self.num_shared} shared prompt tokens on top" if self.num_shared else ""
        return self.lengths.description + shared

    def sampling(self, request: TraceRequest) -> SamplingParams:
        """Outputs are as long as the trace says: the simulated model has no reason of its own to stop."""
        common: dict[str, Any] = {"max_tokens": request.num_output_tokens, "ignore_eos": True}
        if self.beam:
            common["use_beam_search"] = True
        samples = self.num_sequences > 1 and not self.beam
        return SamplingParams(n=self.num_sequences, temperature=1.0 if samples else 0.0, **common)


@dataclass(frozen=True)
class Run:
    """One point of a curve. Picklable, so that runs can be spread over processes."""

    setup: Setup
    system: System
    workload: Workload
    rate: float
    duration_s: float
    seed: int = 0
    bound: float = float("inf")
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What a run measured. Memory shares are means over time; see MemoryMeter."""

    rate: float
    num_requests: int
    normalized_latency: float
    exceeded: bool
    num_batched: float
    num_steps: int
    num_preemptions: int
    num_output_tokens: int
    simulated_s: float
    memory: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        finite = self.normalized_latency != float("inf")
        return {
            **values,
            "normalized_latency": self.normalized_latency if finite else None,
            "memory": dict(self.memory),
        }


def simulate(run: Run) -> RunResult:
    """Run it on the virtual clock."""
    trace = poisson_trace(run.workload.lengths, run.rate, run.duration_s, run.seed, run.workload.num_shared)
    engine, executor = build_engine(run.setup, run.system, **run.options)
    window = Window.of(trace)
    batch, memory = BatchMeter(executor, window), MemoryMeter(engine, executor, window)
    result: Replay = replay(
        engine,
        executor.clock,
        trace,
        run.workload.sampling,
        seed=run.seed,
        bound=run.bound,
        observe=(batch, memory),
    )
    return RunResult(
        rate=run.rate,
        num_requests=len(trace),
        normalized_latency=result.mean_normalized_latency,
        exceeded=result.exceeded,
        num_batched=batch.mean / run.workload.num_sequences,
        num_steps=result.num_steps,
        num_preemptions=result.num_preemptions,
        num_output_tokens=result.num_output_tokens,
        simulated_s=result.duration_s,
        memory=memory.means(),
    )
