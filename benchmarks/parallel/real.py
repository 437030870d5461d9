"""Decode steps of the real engine on this machine, by the number of ranks."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple
from unittest import mock

from engine import LLM, SamplingParams
from engine.control.step_codec import encode_step
from engine.engine import LLMEngine
from engine.model_config import ModelConfig
from engine.request import EngineRequest
from engine.scheduling import SamplerOutput, SchedulerOutput


class RealStep(NamedTuple):
    """Median milliseconds of a decode step, rank 0's, and what it exchanges with the others.

    Attributes:
        control_ms: encoding the step and sending it.
        communication_ms: inside collectives, waiting for the slowest rank included.
        compute_ms: the rest of the model.
        host_ms: the rest of the step: scheduling, drawing, bookkeeping.
        exchanged_bytes: payload of a step's collectives.
    """

    ranks: int
    threads: int
    batch: int
    step_ms: float
    compute_ms: float
    communication_ms: float
    control_ms: float
    host_ms: float
    exchanged_bytes: int


def measure_real(model: str, ranks: int, batch: int, *, threads: int, context: int, steps: int) -> RealStep:
    """`batch` sequences of about `context` tokens, all decoding."""
    llm = LLM(
        model,
        device="cpu",
        kernels="native",
        tensor_parallel_size=ranks,
        num_threads=threads,
        max_model_len=context + steps + 32,
        max_num_seqs=batch,
        enable_prefix_caching=False,
    )
    engine = llm.engine
    try:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 8, ignore_eos=True)
        for number in range(batch):
            engine.add_request(EngineRequest(f"r{number}", [number + 10, *range(100, 99 + context)], params))
        found = _decode_steps(engine, batch, steps)
    finally:
        engine.close()
    medians = [statistics.median(column) for column in zip(*found, strict=True)]
    step_ms, model_ms, communication_ms, control_ms = medians
    return RealStep(
        ranks,
        threads,
        batch,
        step_ms,
        model_ms - communication_ms,
        communication_ms,
        control_ms,
        step_ms - model_ms - control_ms,
        exchanged_bytes(engine.model_config, ranks, batch),
    )


def exchanged_bytes(model: ModelConfig, ranks: int, batch: int) -> int:
    """What a decode step sums and gathers over ranks: two sums a layer and one of the embeddings, float32 hidden
    states of all rows, and the logits of all, each row once."""
    if ranks == 1:
        return 0
    return 4 * batch * ((2 * model.num_layers + 1) * model.hidden_size + model.vocab_size)


def _decode_steps(engine: LLMEngine, batch: int, steps: int) -> list[tuple[float, float, float, float]]:
    """Milliseconds of each step in which all sequences decode: all of it, model, communication, control."""
    executor: Any = engine._executor
    runner: Any = executor._worker._runner
    group: Any = getattr(executor, "_group", None)
    found: list[tuple[float, float, float, float]] = []
    control: list[float] = []
    decoding: list[bool] = []

    def timed_execute(output: SchedulerOutput) -> SamplerOutput:
        decoding.append(output.num_tokens == batch == len(output.scheduled))
        began = time.perf_counter()
        group.rouse()
        group.broadcast(encode_step(output))
        control.append(time.perf_counter() - began)
        drawn: SamplerOutput = executor._worker.execute(output)
        group.finished()
        return drawn

    def plain_execute(output: SchedulerOutput) -> SamplerOutput:
        decoding.append(output.num_tokens == batch == len(output.scheduled))
        control.append(0.0)
        drawn: SamplerOutput = executor._worker.execute(output)
        return drawn

    with mock.patch.object(executor, "execute", timed_execute if group is not None else plain_execute):
        while len(found) < steps and engine.has_unfinished_requests:
            runner.reset_phases()
            began = time.perf_counter()
            engine.step()
            seconds = time.perf_counter() - began
            phases = runner.phase_seconds()
            if decoding[-1]:
                row = (seconds, phases["total"], phases["communication"], control[-1])
                found.append((1e3 * row[0], 1e3 * row[1], 1e3 * row[2], 1e3 * row[3]))
    return found
