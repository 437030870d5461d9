"""Where an engine's steps spend their time: each step recorded, with the phases that a native runner reports.

All that reaches into the engine's private parts is in `Probe`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from engine.engine import LLMEngine
from engine.outputs import SequenceOutput
from engine.scheduling import SamplerOutput, SchedulerOutput

if TYPE_CHECKING:
    from engine.int32_buffer import Int32Array
    from engine.loading.stored_tensor import FloatArray

NATIVE_PHASES = ("gemm", "head", "attention", "other")


class Step(NamedTuple):
    """One step.

    Attributes:
        seconds: from its start to its outputs.
        phases: seconds by phase, adding up to `seconds`. A native runner's are NATIVE_PHASES, the parts of its C++
            call; any other's is "model". Both have "sampling" and "python", all else in the step.
        output: what it computed.
    """

    seconds: float
    phases: dict[str, float]
    output: SchedulerOutput

    @property
    def python_share(self) -> float:
        """What is not the model's own computation: (step − C++ call) ÷ step, for a native runner."""
        return (self.phases["sampling"] + self.phases["python"]) / self.seconds


class Probe:
    """An engine's runner: its phases and its sizes. A native runner brings `phase_seconds`, `reset_phases`,
    `weight_bytes` and `kv_bytes_per_token`; for the torch runner sizes come of its types."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        executor: Any = engine._executor
        self._executor = executor
        self._worker: Any = executor._worker
        self._runner: Any = self._worker._runner
        self.has_phases = hasattr(self._runner, "phase_seconds")

    def weight_bytes(self) -> dict[str, int]:
        """What a step reads of the weights: "gemm", all matrices of the layers, and "head"."""
        if hasattr(self._runner, "weight_bytes"):
            weights: dict[str, int] = self._runner.weight_bytes()
            return weights
        from benchmarks.cpu.roofline import gemm_weights, head_weights

        model, itemsize = self._engine.model_config, self._worker._dtype.itemsize
        return {"gemm": gemm_weights(model) * itemsize, "head": head_weights(model) * itemsize}

    def kv_bytes_per_token(self) -> float:
        """Keys and values of one token in all layers, scales included."""
        if hasattr(self._runner, "kv_bytes_per_token"):
            return float(self._runner.kv_bytes_per_token())
        cache = self._engine.cache_config
        pool_bytes: int = self._runner._cache.kv_pool.nbytes
        return pool_bytes / (cache.num_blocks * cache.block_size)

    def logits(self, token_ids: Int32Array) -> FloatArray:
        """All rows' logits of one sequence; see ModelRunner.logits."""
        logits: FloatArray = self._runner.logits(token_ids)
        return logits

    @contextmanager
    def recording(self) -> Iterator[list[Step]]:
        """Every step of the engine until the end of the `with`."""
        steps: list[Step] = []
        executed: list[tuple[SchedulerOutput, float]] = []
        sampling: list[float] = []
        execute, step = self._executor.execute, self._engine.step

        def timed_execute(output: SchedulerOutput) -> SamplerOutput:
            began = time.perf_counter()
            result: SamplerOutput = execute(output)
            executed.append((output, time.perf_counter() - began))
            return result

        def timed_step() -> list[SequenceOutput]:
            executed.clear()
            sampling.clear()
            if self.has_phases:
                self._runner.reset_phases()
            began = time.perf_counter()
            outputs = step()
            seconds = time.perf_counter() - began
            if executed:
                output, execute_s = executed[0]
                steps.append(Step(seconds, self._phases(seconds, execute_s, sum(sampling)), output))
            return outputs

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(self._executor, "execute", timed_execute))
            stack.enter_context(mock.patch.object(self._engine, "step", timed_step))
            sampler = getattr(self._runner, "_sampler", None)
            if sampler is not None:
                stack.enter_context(mock.patch.object(sampler, "sample", _timed(sampler.sample, sampling)))
            yield steps

    def _phases(self, seconds: float, execute_s: float, sampling_s: float) -> dict[str, float]:
        if self.has_phases:
            measured: dict[str, float] = self._runner.phase_seconds()
            phases = {name: measured[name] for name in NATIVE_PHASES}
            computing = measured["total"]
            phases["other"] = computing - sum(phases.values()) + phases["other"]
        else:
            computing = execute_s - sampling_s
            phases = {"model": computing}
        return {**phases, "sampling": sampling_s, "python": seconds - computing - sampling_s}


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """`function`, its durations appended to `seconds`."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - began)

    return call
