"""Hands each step's work to the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from engine.scheduling import SampledToken, SchedulerOutput

if TYPE_CHECKING:
    from engine.execution.worker import Worker


class Executor(Protocol):
    """Runs a step on all ranks and returns the drawn tokens once."""

    def execute(self, output: SchedulerOutput) -> list[SampledToken]: ...


class UniprocExecutor:
    """One rank, in the caller's thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def execute(self, output: SchedulerOutput) -> list[SampledToken]:
        return self._worker.execute(output)
