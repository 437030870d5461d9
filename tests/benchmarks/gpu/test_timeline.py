"""Where the device waits, from what ran on it."""

from __future__ import annotations

import pytest

from benchmarks.gpu.timeline import DeviceEvent, Timeline, read_timeline


def test_gaps_within_a_graph_are_told_from_those_between_launches() -> None:
    events = [
        DeviceEvent(0, 10, launch=1),
        DeviceEvent(12, 20, launch=1),  # 2 within
        DeviceEvent(25, 60, launch=2),  # 5 between
        DeviceEvent(60, 80, launch=3),
        DeviceEvent(30, 40, launch=9),  # another stream's, hidden behind launch 2
        DeviceEvent(83, 100, launch=4),  # 3 between
    ]
    assert read_timeline(events) == pytest.approx(Timeline(busy=0.90, idle_between=0.08, idle_within=0.02))
    assert read_timeline([DeviceEvent(5, 6, 1)]) == Timeline(1.0, 0.0, 0.0)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw nothing"):
        read_timeline([])
