"""Which tokens each step computes. Plain Python, no torch."""

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import (
    BeamCandidate,
    BeamCandidates,
    SampledToken,
    SampleRequest,
    SamplerOutput,
    ScheduledSequence,
    SchedulerOutput,
)
from engine.scheduling.static_scheduler import StaticScheduler

SCHEDULERS: dict[str, type[Scheduler]] = {"continuous": Scheduler, "static": StaticScheduler}

__all__ = [
    "SCHEDULERS",
    "BeamCandidate",
    "BeamCandidates",
    "SampleRequest",
    "SampledToken",
    "SamplerOutput",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerOutput",
    "StaticScheduler",
]
