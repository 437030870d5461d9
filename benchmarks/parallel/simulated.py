"""A decode step on several H200s with NVLink, by the step-time model: simulated, nothing here ran on a GPU."""

from __future__ import annotations

from typing import NamedTuple

from engine.execution.hardware import find_hardware
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import open_checkpoint

DEVICES = {1: "h200", 2: "2x-h200", 4: "4x-h200", 8: "8x-h200"}
MODELS = ("dummy:llama-3-70b", "dummy:opt-175b")
_BLOCK_SIZE = 16


class SimulatedStep(NamedTuple):
    """Seconds of one step by what they are spent on, and bytes that each rank sends.

    Attributes:
        host_s: scheduling, input preparation, launches and sampling; what telling other ranks costs is part of it.
    """

    model: str
    ranks: int
    seconds: float
    compute_s: float
    communication_s: float
    host_s: float
    sent_bytes: float


def simulate(source: str, batch: int, context: int) -> list[SimulatedStep]:
    """On each number of devices that the model's weights fit into."""
    model = open_checkpoint(source).model_config()
    work = StepWork(batch, batch, batch, batch * context, batch * context)
    steps = []
    for ranks, name in DEVICES.items():
        times = StepTimeModel(model, find_hardware(name), _BLOCK_SIZE)
        if times.num_affordable_blocks() * _BLOCK_SIZE < batch * context:
            continue
        seconds, host, communication = times.seconds(work), times.host_seconds(work), times.communication_seconds(work)
        compute = seconds - host - communication
        name = source.removeprefix("dummy:")
        steps.append(SimulatedStep(name, ranks, seconds, compute, communication, host, times.sent_bytes(work)))
    return steps
