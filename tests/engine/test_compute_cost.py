from __future__ import annotations

import numpy as np
import pytest

from engine.compute_cost import ComputeCost


def observed(steps: list[tuple[int, float]]) -> ComputeCost:
    """What these steps of (tokens, seconds) tell, all with one context."""
    cost = ComputeCost()
    for num_tokens, seconds in steps:
        cost.observe(num_tokens, 1000, seconds)
    return cost


def test_nothing_observed_costs_nothing() -> None:
    assert ComputeCost().seconds(100) == 0.0


def test_what_a_step_costs_anyway_is_left_out() -> None:
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(8, 16, 400).tolist(), *rng.integers(256, 512, 40).tolist()]
    cost = observed([(size, 0.02 + 3e-4 * size + rng.normal(0.0, 0.004)) for size in sizes])
    assert cost.seconds(200) == pytest.approx(200 * 3e-4, rel=0.1)
    assert cost.seconds(1000) == pytest.approx(1000 * 3e-4, rel=0.1)


def test_steps_of_one_size_give_their_mean() -> None:
    assert observed([(50, 0.1)] * 20).seconds(25) == pytest.approx(0.05)
    assert observed([(50, 0.1)]).seconds(25) == pytest.approx(0.05)


def test_larger_steps_that_happen_to_be_faster_do_not_give_a_negative_price() -> None:
    assert observed([(10, 0.2), (100, 0.1)] * 20).seconds(50) == 0.0


def test_a_device_that_became_slower_is_followed() -> None:
    def steps(seconds_per_token: float, count: int) -> list[tuple[int, float]]:
        return [(size, 0.01 + seconds_per_token * size) for size in (10, 200) * (count // 2)]

    assert observed(steps(1e-4, 300) + steps(1e-3, 300)).seconds(100) == pytest.approx(0.1, rel=0.02)
    assert observed(steps(1e-4, 300) + steps(1e-3, 10)).seconds(100) < 0.05  # a few steps do not decide


def test_what_prompts_cost_outlasts_any_number_of_small_steps() -> None:
    """Sequences that only grow, in steps of a few tokens and bound by reading the weights, cost nothing a token."""
    prompts, growth = [(500, 0.01 + 500 * 2e-5)] * 20, [(size, 0.01) for size in (17, 18, 20)] * 1000
    assert observed(prompts + growth).seconds(500) == pytest.approx(0.01, rel=0.1)


def test_tokens_that_a_step_computes_for_nothing_are_free() -> None:
    roofline = [(size, max(0.01, 1e-4 * size)) for size in (*[20] * 40, 100, 400) * 20]
    assert observed(roofline).seconds(50) == pytest.approx(0.0, abs=1e-3)
    assert observed(roofline).seconds(350) == pytest.approx(0.0265, rel=0.1)


def test_steps_that_were_slow_for_another_reason_do_not_raise_the_price() -> None:
    """Steps of 64 tokens were those with many sequences, each of which costs something itself."""
    cost = observed([(20, 0.01), (64, 0.05), (500, 0.058)] * 20 + [(20, 0.01)] * 100)
    assert cost.seconds(44) == pytest.approx(44 * 1e-4, rel=0.1)


def test_older_steps_that_read_less_are_compared_as_if_they_read_as_much() -> None:
    """Prompts come first, when contexts are short; growing sequences later take as long as the prompts did."""
    cost = ComputeCost()

    def observe(num_tokens: int, context: int) -> None:
        cost.observe(num_tokens, context, 0.01 + 1e-4 * num_tokens + 1e-6 * context)

    for context in range(500, 5_000, 500):
        observe(500, context)
    for context in range(5_000, 80_000, 50):
        observe(30, context)
    assert cost.seconds(400) == pytest.approx(0.04, rel=0.05)
