"""Which tokens each step computes. Plain Python, no torch."""

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SampledToken, SampleRequest, ScheduledSequence, SchedulerOutput
from engine.scheduling.static_scheduler import StaticScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {"continuous": Scheduler, "static": StaticScheduler}

__all__ = [
    "SCHEDULERS",
    "SampleRequest",
    "SampledToken",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerOutput",
    "StaticScheduler",
]
