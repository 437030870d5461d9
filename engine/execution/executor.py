"""Hands each step's work to the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput

if TYPE_CHECKING:
    from engine.execution.worker import Worker


class Executor(Protocol):
    """Runs a step on all ranks and returns the drawn tokens once."""

    def execute(self, output: SchedulerOutput) -> SamplerOutput: ...

    def swap_cost(self) -> SwapCost | None:
        """What moving blocks to the host and back costs; None without a swap pool."""
        ...


class UniprocExecutor:
    """One rank, in the caller's thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        return self._worker.execute(output)

    def swap_cost(self) -> SwapCost | None:
        return self._worker.swap_cost
