from __future__ import annotations

import random

import pytest

from app.autoscaling.offered import OfferedLoad, Rates
from app.autoscaling.report import ReplicaReport


def report(requests: float, prompt: float = 0.0, output: float = 0.0, drawn: float = 0.0) -> ReplicaReport:
    return ReplicaReport(requests, prompt, output, num_output_tokens=drawn)


def test_growth_of_all_replicas_over_time() -> None:
    load = OfferedLoad()
    load.observe(0.0, {"a": report(10), "b": report(7)})
    load.observe(5.0, {"a": report(20, 1000, 50, 40), "b": report(17, 500, 50, 10)})
    assert load.rates(5.0, 5.0) == Rates(4.0, 300.0, 20.0, 10.0)
    # The same exports again are no news.
    load.observe(5.1, {"a": report(20, 1000, 50, 40), "b": report(17, 500, 50, 10)})
    assert load.rates(10.0, 10.0).requests == 2.0
    assert load.rates(12.0, 5.0).requests == 0.0


def test_a_replica_seen_for_the_first_time_brings_no_past_and_one_that_restarts_none_either() -> None:
    load = OfferedLoad()
    load.observe(0.0, {"a": report(0)})
    load.observe(1.0, {"a": report(1), "old": report(1e6)})
    load.observe(2.0, {"a": report(2), "old": report(1e6 + 1)})
    load.observe(3.0, {"a": report(0)})
    load.observe(4.0, {"a": report(1)})
    assert load.rates(4.0, 4.0).requests == 1.0


def offered(slope: float, noise: float, seconds: int) -> tuple[OfferedLoad, float]:
    rng = random.Random(5)
    load, total, now_s = OfferedLoad(), 0.0, 0.0
    for tick in range(4 * seconds):
        now_s = tick / 4
        total += max((1000.0 + slope * now_s) * (1.0 + noise * rng.uniform(-1, 1)), 0.0) / 4
        load.observe(now_s, {"a": report(0.0, total)})
    return load, now_s


@pytest.mark.parametrize("slope", [100.0, -40.0])
def test_a_trend_is_found(slope: float) -> None:
    load, now_s = offered(slope, 0.0, 20)
    assert load.trend(now_s) == pytest.approx(slope, rel=0.05)


def test_noise_is_no_trend_and_a_second_is_too_short_for_one() -> None:
    load, now_s = offered(0.0, 0.5, 30)
    assert abs(load.trend(now_s)) < 15.0
    load, now_s = offered(100.0, 0.0, 4)
    assert load.trend(now_s) == 0.0
