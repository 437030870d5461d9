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

__all__ = [
    "BeamCandidate",
    "BeamCandidates",
    "SampleRequest",
    "SampledToken",
    "SamplerOutput",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerOutput",
]
