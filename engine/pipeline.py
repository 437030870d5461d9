"""Asynchronous scheduling: a step is prepared while the one before it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from engine.config import AsyncScheduling
from engine.errors import ConfigError
from engine.execution.executor import AsyncExecutor, Executor, PendingStep
from engine.scheduling import SamplerOutput, SchedulerOutput
from engine.sequence import SequenceGroup


class StepInFlight(NamedTuple):
    """A step on its way: what it computes, for which groups, and since when (seconds of the engine's clock)."""

    output: SchedulerOutput
    groups: tuple[SequenceGroup, ...]
    pending: PendingStep
    submitted_at: float


class CollectedStep(NamedTuple):
    """A step that has run: what it computed, what it drew, and how long it kept the device busy."""

    output: SchedulerOutput
    drawn: SamplerOutput
    seconds: float


class Pipeline:
    """The steps in flight, at most two and the older one first: one that runs, and the next, prepared meanwhile."""

    DEPTH = 2

    def __init__(self, executor: AsyncExecutor, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._clock = clock
        self._steps: deque[StepInFlight] = deque()
        self._last_collected_at = clock()

    def __len__(self) -> int:
        return len(self._steps)

    def submit(self, output: SchedulerOutput, groups: tuple[SequenceGroup, ...]) -> None:
        """Hand a step to the device. `groups`: those that it computes or draws for, each once."""
        assert len(self._steps) < self.DEPTH
        self._steps.append(StepInFlight(output, groups, self._executor.submit(output), self._clock()))
        for group in groups:
            group.num_steps_in_flight += 1

    def collect(self) -> CollectedStep:
        """Wait for the oldest step."""
        step = self._steps.popleft()
        drawn = step.pending.result()
        for group in step.groups:
            group.num_steps_in_flight -= 1
        began, self._last_collected_at = max(step.submitted_at, self._last_collected_at), self._clock()
        return CollectedStep(step.output, drawn, self._last_collected_at - began)


def make_pipeline(wanted: AsyncScheduling, executor: Executor, clock: Callable[[], float]) -> Pipeline | None:
    """The pipeline that `async_scheduling` asks for; None for an engine that waits for each step.

    Raises:
        ConfigError: it was asked for by name, and the executor runs each step before it takes the next.
    """
    if wanted is False:
        return None
    if not isinstance(executor, AsyncExecutor):
        if wanted is True:
            raise ConfigError("async_scheduling=True needs a device that runs beside the host, such as a GPU")
        return None
    return Pipeline(executor, clock) if wanted is True or executor.overlaps else None
