"""Requests and their times: Poisson arrivals, and Mooncake traces with their shared prefixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving.workload import TraceOptions, poisson_due, read_trace


def trace(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(timestamp: int, input_length: int, output_length: int, *hash_ids: int) -> dict[str, object]:
    return {
        "timestamp": timestamp,
        "input_length": input_length,
        "output_length": output_length,
        "hash_ids": list(hash_ids),
    }


def test_poisson_arrivals_have_the_rate() -> None:
    due = poisson_due(4000, 20.0, seed=1)
    assert due[0] == 0.0
    assert due == sorted(due)
    assert 3999 / due[-1] == pytest.approx(20.0, rel=0.1)
    assert due == poisson_due(4000, 20.0, seed=1)


def test_equal_blocks_of_a_trace_are_equal_tokens(tmp_path: Path) -> None:
    path = trace(tmp_path, row(0, 1200, 9, 7, 8, 9), row(3000, 1100, 5, 7, 8, 5))
    (first, second), due = read_trace(path, TraceOptions(speed=2.0, max_tokens=4096), seed=0)
    assert (len(first.prompt), first.num_output_tokens) == (1200, 9)
    assert (len(second.prompt), second.num_output_tokens) == (1100, 5)
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1100] != second.prompt[1024:1100]
    assert 0.0 <= due[0] <= 1.5 <= due[1] <= 3.0, "within its 3 s step, at twice the speed"


def test_lengths_are_scaled_and_bounded(tmp_path: Path) -> None:
    path = trace(tmp_path, row(0, 8000, 400, *range(16)), row(3000, 800, 40, 0, 1))
    options = TraceOptions(scale=0.1, max_tokens=600)
    (long, short), _ = read_trace(path, options, seed=0)
    assert (len(long.prompt), long.num_output_tokens) == (560, 40)
    assert (len(short.prompt), short.num_output_tokens) == (80, 4)
    assert long.prompt[:51] == short.prompt[:51]
    assert len(read_trace(path, TraceOptions(limit=1), seed=0)[0]) == 1


@pytest.mark.parametrize("line", ["{", "[]", '{"timestamp": 0}', '{"timestamp": "x", "input_length": 1}'])
def test_a_line_of_another_format_is_named(tmp_path: Path, line: str) -> None:
    path = trace(tmp_path, row(0, 10, 1, 1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"trace.jsonl: line 2 is no request"):
        read_trace(path, TraceOptions(), seed=0)
