from __future__ import annotations

import pytest

from app.balancer.service_rate import ServiceRate


def served(rate: ServiceRate, start: float, seconds: float, work_a_second: float, *, waiting: bool = True) -> float:
    now = start
    while now < start + seconds:
        now += 0.1
        rate.advance(now, waiting, 2)
        rate.sent(work_a_second * 0.1)
    return now


def test_until_something_was_measured_a_replica_does_its_work() -> None:
    assert ServiceRate().rate(3) == 3.0


def test_it_is_what_was_sent_while_some_waited() -> None:
    rate = ServiceRate()
    now = served(rate, 0.0, 20.0, 1.2)
    assert rate.rate(2) == pytest.approx(1.2, rel=0.05)
    assert rate.rate(4) == pytest.approx(2.4, rel=0.05), "a replica more does as much as those there are"
    # Idle hours say nothing of what can be served.
    now = served(rate, now + 2.0, 3600.0, 0.01, waiting=False)
    assert rate.rate(2) == pytest.approx(1.2, rel=0.15)
    served(rate, now, 20.0, 0.6)
    assert rate.rate(2) == pytest.approx(0.6, rel=0.05)


def test_moments_in_which_nobody_waits_are_part_of_it() -> None:
    # Two ingresses take turns: each is served half of the time, and empties its queue at once.
    rate = ServiceRate()
    for step in range(400):
        now = step * 0.1
        rate.advance(now, step % 4 == 0, 2)
        if step % 4 == 0:
            rate.sent(0.4)
    assert rate.rate(2) == pytest.approx(1.0, rel=0.1)


def test_a_standstill_is_no_promise_to_stand_still() -> None:
    rate = ServiceRate()
    served(rate, 0.0, 100.0, 0.0)
    assert 0.0 < rate.rate(2) < 0.1
