from __future__ import annotations

import random

import pytest

from app.autoscaling.offered import OfferedLoad, Rates
from app.autoscaling.report import ReplicaReport


def report(requests: float, prompt: float = 0.0, output: float = 0.0, drawn: float = 0.0) -> ReplicaReport:
    squares = prompt * prompt / requests if requests else 0.0
    return ReplicaReport(requests, prompt, squares, output, num_output_tokens=drawn)


def test_growth_of_all_replicas_over_time() -> None:
    load = OfferedLoad()
    load.observe(0.0, {"a": report(0), "b": ReplicaReport(7)})
    exports = {"a": report(10, 1000, 50, 40), "b": ReplicaReport(17, 500, 25_000, 50, num_output_tokens=10)}
    load.observe(5.0, exports)
    assert load.rates(5.0, 5.0) == Rates(4.0, 300.0, 25_000.0, 20.0, 10.0)
    # The same exports again are no news.
    load.observe(5.1, exports)
    assert load.rates(10.0, 10.0).requests == 2.0
    assert load.rates(12.0, 5.0).requests == 0.0


def test_how_much_prompts_differ() -> None:
    rates = Rates(2.0, 400.0, 100**2 + 300**2, 0.0, 0.0)
    assert rates.mean_prompt == 200.0
    assert rates.prompt_variation == pytest.approx((100 / 200) ** 2)
    assert Rates(2.0, 400.0, 2 * 200**2, 0.0, 0.0).prompt_variation == 0.0
    assert (Rates(0, 0, 0, 0, 0).mean_prompt, Rates(0, 0, 0, 0, 0).prompt_variation) == (0.0, 0.0)


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
