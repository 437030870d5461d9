"""What a replay shows: times in the trace's clock, hits by what the replicas said."""

from __future__ import annotations

import pytest

from benchmarks.cpu.requests import Request
from benchmarks.fleet.report import markdown, ratios, replay_summary
from benchmarks.serving.client import StreamRecord


def record(first_s: float, cached: int, error: str | None = None) -> StreamRecord:
    return StreamRecord(1.0, first_s=first_s, num_cached_tokens=cached, error=error)


def test_times_are_of_the_trace_and_failures_are_counted() -> None:
    requests = [Request([1] * 100, 1)] * 3
    entry = replay_summary(requests, [record(1.5, 50), record(2.5, 0), record(0.0, 0, "status 503")], 2.0)
    assert (entry["requests"], entry["failed"]) == (3, 1)
    assert entry["hit_rate"] == 0.25
    assert entry["ttft_mean_s"] == pytest.approx(2.0)
    assert entry["ttft_p99_s"] == pytest.approx(3.0)


def test_nothing_answered_is_an_error() -> None:
    with pytest.raises(ValueError, match="no request was answered: status 500"):
        replay_summary([Request([1], 1)], [record(0.0, 0, "status 500")], 1.0)


def test_ratios_leave_out_what_the_simulation_has_none_of() -> None:
    real = {"hit_rate": 0.2, "ttft_mean_s": 1.0, "ttft_p50_s": 1.0, "ttft_p90_s": 1.0, "ttft_p99_s": 3.0}
    simulated = {**real, "hit_rate": 0.0, "ttft_p99_s": 2.0}
    assert ratios(real, simulated) == {"ttft_mean_s": 1.0, "ttft_p50_s": 1.0, "ttft_p90_s": 1.0, "ttft_p99_s": 1.5}


def test_the_table_begins_with_the_quickest() -> None:
    slow = {"hit_rate": 0.1, "ttft_mean_s": 2.0, "ttft_p50_s": 1.0, "ttft_p90_s": 3.0, "ttft_p99_s": 9.0}
    lines = markdown({"slow": slow, "quick": {**slow, "ttft_mean_s": 1.0}}).splitlines()
    assert lines[2] == "| quick | 0.100 | 1.00 | 3.00 | 9.0 | 1.00 |"
    assert lines[3].startswith("| slow |")
