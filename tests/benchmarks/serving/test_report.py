"""The figures: percentiles, goodput, the tax, the ratio."""

from __future__ import annotations

import pytest

from benchmarks.serving.client import StreamRecord
from benchmarks.serving.report import (
    FirstTokens,
    HttpRun,
    Objectives,
    OfflineRun,
    first_token_summary,
    process_lines,
    serving_tax_ms,
    summary,
    used_seconds,
)


def record(ttft_s: float, tpot_s: float, tokens: int = 11) -> StreamRecord:
    times = [10.0 + ttft_s + index * tpot_s for index in range(tokens)]
    return StreamRecord(10.0, 10.0, times[0], times[-1] + 0.01, tokens + 2, tokens, None, times)


def test_the_tax_is_what_serving_adds_to_a_token() -> None:
    http = HttpRun([record(0.1, 0.01, 100), record(0.1, 0.01, 100)], 2.0, cpu_s=3.1)
    assert serving_tax_ms(http, OfflineRun(200, 1.5, 3.0)) == pytest.approx(0.5)
    assert serving_tax_ms(http, OfflineRun(400, 3.0, 6.0)) == pytest.approx(0.5), "the engine's share is by token"
    assert serving_tax_ms(HttpRun(http.records, 2.0, None), OfflineRun(200, 1.5, 3.0)) is None


def test_what_an_idle_server_uses_is_told_apart() -> None:
    http = HttpRun([record(0.1, 0.01, 100), record(0.1, 0.01, 100)], 2.0, cpu_s=3.1)
    result = summary([http], [OfflineRun(200, 1.5, 3.0)], Objectives(1, 1), idle_cores=0.04)
    assert (result["core_ms_per_token"], result["idle_cores"]) == (pytest.approx(0.5), 0.04)
    assert result["busy_core_ms_per_token"] == pytest.approx(0.1)
    assert summary([http], [OfflineRun(200, 1.5, 3.0)], Objectives(1, 1))["busy_core_ms_per_token"] is None


def test_what_others_than_the_engine_used_is_told_apart() -> None:
    records = [record(0.1, 0.01, 100), record(0.1, 0.01, 100)]
    runs = [HttpRun(records, 2.0, 3.1, 3.0), HttpRun(records, 2.0, 3.3, 3.14), HttpRun(records, 2.0, 3.5, 3.38)]
    result = summary(runs, [OfflineRun(200, 1.5, 3.0)] * 3, Objectives(1, 1))
    assert result["beside_core_ms_per_token"] == pytest.approx(0.6)
    assert result["core_ms_per_token_runs"] == [0.5, 1.5, 2.5]
    assert result["core_ms_per_token_error"] == pytest.approx(1 / 3**0.5)
    alone = summary(runs[:1], [], Objectives(1, 1))
    assert alone["core_ms_per_token_error"] is None
    assert summary([HttpRun(records, 2.0, None)], [], Objectives(1, 1))["beside_core_ms_per_token"] is None


def test_processes_that_begin_and_end_while_it_is_measured() -> None:
    before, after = {(1, "a"): 2.0, (2, "b"): 1.0}, {(1, "a.method"): 2.5, (3, "c"): 0.25}
    assert used_seconds(before, after) == {(1, "a.method"): 0.5, (3, "c"): 0.25}


def test_the_summary() -> None:
    records = [record(0.1 * number, 0.02) for number in range(1, 11)]
    failed = StreamRecord(10.0, error="status 503")
    runs = [HttpRun([*records, failed], 4.0, 1.0)]
    result = summary(runs, [OfflineRun(110, 2.0, 0.89)], Objectives(ttft_s=0.55, tpot_s=0.05))
    assert result["out_tok_s"] == pytest.approx(110 / 4)
    assert result["offline_ratio"] == pytest.approx(0.5)
    assert result["core_ms_per_token"] == pytest.approx(1.0)
    assert result["ttft_p50_s"] == pytest.approx(0.55)
    assert 0.95 < result["ttft_p99_s"] < 1.0
    assert result["tpot_p50_s"] == pytest.approx(0.02)
    assert result["goodput_share"] == pytest.approx(5 / 11)
    assert result["goodput_req_s"] == pytest.approx(5 / 4)
    assert (result["num_requests"], result["num_failed"], result["errors"]) == (11, 1, ["status 503"])


def test_what_serving_adds_to_the_first_token_is_the_median_of_what_it_adds_to_each() -> None:
    pairs = [FirstTokens(0.110, 0.100), FirstTokens(0.215, 0.200), FirstTokens(0.302, 0.300)]
    result = first_token_summary(pairs)
    assert result["added_ttft_p50_s"] == pytest.approx(0.010)
    assert (result["paired_http_p50_s"], result["paired_alone_p50_s"], result["num_pairs"]) == (0.215, 0.200, 3)


def test_a_slow_stream_is_not_good_however_soon_it_began() -> None:
    result = summary([HttpRun([record(0.1, 0.2)], 1.0, None)], [], Objectives(1.0, 0.1))
    assert result["goodput_share"] == 0.0
    assert result["core_ms_per_token"] is result["offline_ratio"] is None


def test_processes_are_listed_by_what_they_used() -> None:
    before = {(1, "a"): 5.0, (2, "b"): 1.0}
    lines = list(process_lines(before, {(1, "a"): 5.01, (2, "b"): 2.0, (3, "c"): 3.0}))
    assert [line.split()[-1] for line in lines] == ["c", "b"]
