from __future__ import annotations

import random

import pytest

from benchmarks.overload.report import Try, phase_summary, retry_summary
from benchmarks.overload.workload import CALM, FLOODING, Coming, Lengths, Phase, arrivals, jitter_s


def test_each_phase_brings_its_load_of_each_tenant() -> None:
    phases = [Phase("low", 100.0, 0.5), Phase("high", 100.0, 4.0, 0.2)]
    coming = arrivals(phases, Lengths((10, 20), (3, 5)), 10.0, 0)
    counts = {
        (phase, tenant): sum(one.phase == phase and one.tenant == tenant for one in coming)
        for phase in ("low", "high")
        for tenant in (CALM, FLOODING)
    }
    assert counts["low", CALM] == 0
    assert counts["low", FLOODING] == pytest.approx(500, rel=0.2)
    assert counts["high", CALM] == pytest.approx(200, rel=0.3)
    assert counts["high", FLOODING] == pytest.approx(3800, rel=0.1)
    assert [one.due_s for one in coming] == sorted(one.due_s for one in coming)
    assert {one.prompt_tokens for one in coming} <= set(range(10, 21))
    assert coming == arrivals(phases, Lengths((10, 20), (3, 5)), 10.0, 0)


def test_jitter_is_up_to_a_second_and_a_tenth() -> None:
    draw = random.Random(0)
    found = [jitter_s(draw, 20) for _ in range(1000)]
    assert 0.0 <= min(found) < 0.2
    assert 2.8 < max(found) <= 3.0


def test_the_summaries_count_what_clients_met() -> None:
    one = Coming(0, 0.0, "p", CALM, 10, 5)
    tries = [
        Try(one, 0, 1.0, ttft_s=0.5, end_s=2.0),
        Try(one, 0, 2.0, retry_after_s=7),
        Try(one, 0, 3.0, error="broken"),
        Try(one, 1, 9.0, ttft_s=2.5, end_s=12.0),
        Try(one, 1, 99.0, retry_after_s=1),
    ]
    found = phase_summary(tries, 0.0, 50.0, 2.0)
    assert (found["first_tries"], found["refused"], found["retries"], found["errors"]) == (3, 2, 1, 1)
    assert (found["admitted"], found["in_time_share"], found["retry_after_max_s"]) == (2, 0.5, 7)
    assert retry_summary(tries) == {"retries": 2, "admitted": 1, "admitted_share": 0.5}
