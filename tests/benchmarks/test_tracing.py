"""The tracing benchmark adds pieces of one run up, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import tracing
from benchmarks.tracing import Workload

SETTING: dict[str, Any] = {"device": "cpu", "sampling": "default"}


def test_pairs_of_earlier_pieces_count(tmp_path: Path) -> None:
    path = tmp_path / "pairs"
    assert tracing._read_pairs(path, SETTING) == []
    pairs = [{"off": 1e-3, "on": 1.1e-3}, {"on": 1.9e-3, "off": 2e-3}]
    for pair in pairs:
        tracing._keep_pair(path, SETTING, pair)
    assert tracing._read_pairs(path, SETTING) == pairs
    with pytest.raises(SystemExit, match="has pairs of another setting"):
        tracing._read_pairs(path, {**SETTING, "sampling": "all"})
    assert tracing._read_pairs(None, SETTING) == []
    tracing._keep_pair(None, SETTING, pairs[0])


def test_the_cost_is_the_mean_of_the_pairs() -> None:
    pairs = [{"off": 1e-3, "on": 1.1e-3}, {"off": 2e-3, "on": 2.0e-3}]
    found = tracing._summary(pairs, Workload(10, 2, 8, 100), SETTING, 12.4)
    assert (found["cost_percent"], found["cost_percent_of_each_pair"]) == (5.0, [10.0, 0.0])
    assert found["cost_percent_standard_error"] == pytest.approx(5.0)
    assert found["cpu_us_per_request"] == pytest.approx(5000.0)
    assert (found["sampling"], found["exported_bytes_per_request"]) == ("default", 12)


def test_what_is_traced_is_left_to_the_server_unless_all_is_asked_for() -> None:
    default, everything = (tracing._tracing_environment("http://collector", name) for name in ("default", "all"))
    assert "OTEL_TRACES_SAMPLER" not in default
    assert everything["OTEL_TRACES_SAMPLER"] == "parentbased_always_on"
