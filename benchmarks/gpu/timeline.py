"""How much of a stretch of time the device works, and how much of it waits between what the host launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch._C._autograd import DeviceType


class DeviceEvent(NamedTuple):
    """Something that ran on the device: a kernel or a copy, in nanoseconds.

    Attributes:
        launch: what launched it; all kernels of one replay of a graph have the same.
    """

    start: int
    end: int
    launch: int


class Timeline(NamedTuple):
    """Shares of the time from the first event to the end of the last.

    Attributes:
        busy: something runs.
        idle_between: nothing runs, and what comes next was launched apart from what was last: the device waits for the
            host, or for a launch to arrive.
        idle_within: nothing runs between two kernels of one graph.
    """

    busy: float
    idle_between: float
    idle_within: float


def read_timeline(events: Iterable[DeviceEvent]) -> Timeline:
    """Events of several streams may overlap. Raises ValueError without any."""
    ordered = sorted(events)
    if not ordered:
        raise ValueError("the profiler saw nothing run on the device")
    first, reached, launch = ordered[0].start, ordered[0].start, ordered[0].launch
    between = within = 0
    for event in ordered:
        gap = event.start - reached
        if gap > 0 and event.launch == launch:
            within += gap
        elif gap > 0:
            between += gap
        if event.end > reached:
            reached, launch = event.end, event.launch
    whole = max(1, reached - first)
    return Timeline(1.0 - (between + within) / whole, between / whole, within / whole)


def profile(run: Callable[[], object]) -> Timeline:
    """What the device does while `run` runs, by torch's profiler, which slows the host a little."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    recorded = profiler.profiler.kineto_results.events()
    return read_timeline(
        DeviceEvent(item.start_ns(), item.end_ns(), item.correlation_id())
        for item in recorded
        if item.device_type() == DeviceType.CUDA and not item.is_user_annotation()
    )
