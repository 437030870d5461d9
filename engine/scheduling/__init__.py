"""Which tokens each step computes. Plain Python, no torch."""

from engine.scheduling.scheduler import Scheduler
from engine.scheduling.scheduler_output import SampledToken, SampleRequest, ScheduledSequence, SchedulerOutput

__all__ = ["SampleRequest", "SampledToken", "ScheduledSequence", "Scheduler", "SchedulerOutput"]
