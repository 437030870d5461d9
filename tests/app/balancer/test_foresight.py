from __future__ import annotations

import pytest

from app.balancer.booking import Booking
from app.balancer.cost import RequestCost
from app.balancer.foresight import Foresight


def served(foresight: Foresight, prefill_s: float, taken_s: list[float]) -> None:
    for number, seconds in enumerate(taken_s):
        booking = Booking(number, RequestCost(100, 10), frozenset(), 0.0, float(number), prefill_s=prefill_s)
        foresight.computed(booking, number + seconds)


def test_until_something_was_served_it_is_as_foreseen() -> None:
    foresight = Foresight()
    foresight.advance(0.0, 3, waiting=False)
    assert foresight.rate == 3.0
    assert foresight.slack_s(1.0, 0.5, 10.0) == 8.5


def test_what_first_tokens_take_longer_than_foreseen_is_taken_off() -> None:
    foresight = Foresight()
    served(foresight, 0.5, [1.0] * 300)
    assert foresight.slack_s(1.0, 0.5, 10.0) == pytest.approx(7.0, abs=0.05)


def test_they_are_not_taken_to_be_faster_than_foreseen() -> None:
    foresight = Foresight()
    served(foresight, 1.0, [0.5] * 100)
    assert foresight.slack_s(1.0, 0.0, 10.0) < 9.0


def test_what_varies_is_foreseen_to_be_worse_than_its_mean() -> None:
    steady, unsteady = Foresight(), Foresight()
    served(steady, 0.5, [0.6] * 200)
    served(unsteady, 0.5, [0.2, 1.0] * 100)
    assert unsteady.slack_s(0.5, 0.1, 10.0) < steady.slack_s(0.5, 0.1, 10.0) - 0.5


def test_a_prompt_that_takes_all_of_its_deadline_may_wait_for_a_little_of_it() -> None:
    assert Foresight().slack_s(60.0, 0.1, 10.0) == pytest.approx(1.0)
