"""Rates drawn towards each other by as much as they are uncertain."""

from __future__ import annotations

import random

import pytest

from app.balancer.rate_pool import RatePool


def test_nobody_has_measured() -> None:
    pool = RatePool(1000.0)
    pool.tell(0, 0.0, 0.0)
    assert pool.estimate(0) == pool.estimate(1) == 1000.0


def test_a_newcomer_is_taken_to_be_like_the_others() -> None:
    pool = RatePool(1000.0)
    for slot, rate in enumerate((100.0, 200.0)):
        pool.tell(slot, rate, 0.0)
    pool.tell(2, 0.0, 0.0)
    pool.tell(2, 0.0, 0.0)
    assert pool.estimate(2) == pytest.approx(150.0)


def test_exact_rates_are_kept() -> None:
    pool = RatePool(1.0)
    for _ in range(2):
        for slot, rate in enumerate((100.0, 300.0, 5000.0)):
            pool.tell(slot, rate, 0.0)
    assert [pool.estimate(slot) for slot in range(3)] == [100.0, 300.0, 5000.0]


def test_equal_replicas_seem_equal_however_noisy() -> None:
    draw = random.Random(0)
    pool = RatePool(1.0)
    noisy = [draw.gauss(10.0, 3.0) for _ in range(8)]
    for _ in range(2):
        for slot, rate in enumerate(noisy):
            pool.tell(slot, rate, 3.0)
    estimates = [pool.estimate(slot) for slot in range(8)]
    assert max(estimates) - min(estimates) < 0.2 * (max(noisy) - min(noisy))
    assert 9.0 < min(estimates) <= max(estimates) < 11.0


def test_differences_beyond_the_noise_remain() -> None:
    pool = RatePool(1.0)
    rates = [10.0, 11.0, 9.0, 10.0, 40.0, 41.0, 39.0, 40.0]
    for _ in range(2):
        for slot, rate in enumerate(rates):
            pool.tell(slot, rate, 1.0)
    for slot, rate in enumerate(rates):
        assert pool.estimate(slot) == pytest.approx(rate, abs=0.2)


def test_one_uncertain_among_certain_ones_is_taken_to_be_like_them() -> None:
    pool = RatePool(1.0)
    for _ in range(2):
        for slot in range(7):
            pool.tell(slot, 10.0 + 0.01 * slot, 0.05)
        pool.tell(7, 60.0, 60.0)
    assert pool.estimate(7) == pytest.approx(10.03, abs=0.1)
    assert pool.estimate(0) == pytest.approx(10.0, abs=0.1), "nor does it pull the others away"


def test_who_has_gone_counts_no_more() -> None:
    pool = RatePool(1.0)
    for slot, rate in enumerate((10.0, 1000.0)):
        pool.tell(slot, rate, 0.0)
    pool.forget(1)
    pool.tell(0, 10.0, 0.0)
    assert pool.estimate(1) == pytest.approx(10.0)
