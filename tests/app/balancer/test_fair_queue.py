from __future__ import annotations

import random

import pytest

from app.balancer.booking import Booking
from app.balancer.cost import RequestCost
from app.balancer.fair_queue import FairQueue
from app.balancer.terms import RequestTerms


def booking(key: int, tenant: str = "a", *, tokens: float = 100.0, deadline: float = 0.0, priority: int = 0) -> Booking:
    terms = RequestTerms(tenant=tenant, priority=priority)
    return Booking(
        *(key, RequestCost(1, 1), frozenset(), float(key), 0.0),
        terms=terms,
        deadline_at=deadline or 100.0 + key,
        num_tokens=tokens,
        work_s=tokens / 1000.0,
    )


def drain(queue: FairQueue, count: int | None = None) -> list[Booking]:
    taken: list[Booking] = []
    while (count is None or len(taken) < count) and (one := queue.pop()) is not None:
        taken.append(one)
    return taken


def queue_of(*bookings: Booking, **weights: float) -> FairQueue:
    queue = FairQueue(weights)
    for one in bookings:
        queue.add(one)
    return queue


def test_a_tenants_own_go_by_deadline() -> None:
    queue = queue_of(booking(1, deadline=30.0), booking(2, deadline=10.0), booking(3, deadline=20.0))
    assert [one.key for one in drain(queue)] == [2, 3, 1]
    assert len(queue) == queue.num_tokens == queue.work_s == 0


def test_of_one_tenants_those_who_were_told_to_come_now_go_first() -> None:
    told = booking(3, deadline=30.0)
    told.promised = True
    queue = queue_of(booking(1, deadline=10.0), booking(2, deadline=20.0), told)
    assert queue.work_before(told) == 0.0
    assert [one.key for one in drain(queue)] == [3, 1, 2]


def test_a_class_goes_before_another_and_its_deadlines_do_not_matter_there() -> None:
    queue = queue_of(booking(1, priority=5, deadline=1.0), booking(2, priority=1, deadline=999.0))
    assert queue.priorities == [1, 5]
    assert queue.pop(3) is None
    assert [one.key for one in drain(queue)] == [2, 1]


def test_who_floods_gets_no_more_than_its_share() -> None:
    flood = [booking(key, "flood") for key in range(200)]
    calm = [booking(key, "calm", tokens=900.0) for key in range(1000, 1010)]
    queue = queue_of(*flood, *calm)
    first = drain(queue, 60)
    of_calm = sum(one.num_tokens for one in first if one.terms.tenant == "calm")
    of_flood = sum(one.num_tokens for one in first if one.terms.tenant == "flood")
    assert 0.7 < of_calm / of_flood < 1.3


def test_weights_are_shares() -> None:
    bookings = [booking(key, tenant) for key, tenant in enumerate(["a", "b"] * 300)]
    first = drain(queue_of(*bookings, b=3.0), 200)
    assert 140 <= sum(one.terms.tenant == "b" for one in first) <= 160


def test_whatever_a_request_asks_for_its_tenant_pays_for_it_later() -> None:
    queue = queue_of(booking(1, "big", tokens=1000.0), booking(2, "big"), *(booking(key) for key in range(3, 20)))
    order = [one.key for one in drain(queue)]
    assert order[0] == 1
    assert 10 <= order.index(2) <= 12, "others have had as much by then"


def sent(queue: FairQueue, count: int) -> list[str]:
    """The tenants of the next few, which go to replicas."""
    tenants = []
    for _ in range(count):
        one = queue.pop()
        assert one is not None
        queue.sent(one)
        tenants.append(one.terms.tenant)
    return tenants


def test_who_asks_for_less_than_its_share_goes_next_and_who_floods_is_not_due() -> None:
    queue = queue_of(*(booking(key, "flood") for key in range(40)))
    sent(queue, 5)
    for key in range(100, 104):
        queue.add(booking(key, "calm"))
        assert queue.work_before(booking(999, "calm")) < 0.25
        following = queue.pop()
        assert following is not None
        assert following.terms.tenant == "calm"
        assert queue.has_had_less(following)
        assert queue.has_others(following)
        queue.sent(following)
        assert sent(queue, 3) == ["flood"] * 3
    after = queue.pop()
    assert after is not None
    assert not queue.has_had_less(after)


@pytest.mark.parametrize(("credit_s", "saved"), [(0.0, 2), (0.8, 8)])
def test_idleness_saves_up_no_more_than_a_few_requests(credit_s: float, saved: int) -> None:
    queue = queue_of(*(booking(key, "flood") for key in range(200)))
    queue.credit_s = credit_s
    sent(queue, 100)
    for key in range(1000, 1050):
        queue.add(booking(key, "late"))
    first = sent(queue, 2 * saved + 8)
    assert first[: saved + 1] == ["late"] * (saved + 1)
    assert first.count("late") == pytest.approx(saved + (saved + 8) / 2, abs=1)


def test_what_goes_nowhere_is_not_charged_and_what_goes_past_the_queue_is() -> None:
    queue = queue_of(*(booking(key, tenant) for key, tenant in enumerate("abab")))
    first = queue.pop()
    assert first is not None
    assert first.terms.tenant == "a"
    assert queue.turn_of(booking(99, "a", deadline=1.0)) == pytest.approx(0.1)
    queue.refund(first)
    assert queue.turn_of(booking(99, "a", deadline=1.0)) == pytest.approx(0.0)
    queue = queue_of(*(booking(key, tenant) for key, tenant in enumerate("abab")))
    queue.overtaken(booking(9, "a", tokens=250.0))
    assert sent(queue, 4) == ["b", "b", "a", "a"]


def test_weights_change_while_they_wait() -> None:
    queue = queue_of(*(booking(key, tenant) for key, tenant in enumerate(["a", "b"] * 50)))
    queue.set_weights({"b": 4.0})
    assert 39 <= sent(queue, 50).count("b") <= 41


def test_the_newest_of_the_last_class_goes_first_and_none_that_was_told_to_come() -> None:
    promised = booking(9, priority=2)
    promised.promised = True
    queue = queue_of(booking(3, priority=1), booking(7, priority=2), booking(5, "b", priority=2), promised)
    newest = queue.newest(above=0)
    assert newest is not None
    assert newest.key == 7
    assert queue.newest(above=2) is None
    for key in (7, 5):
        queue.remove(next(one for one in queue if one.key == key))
    newest = queue.newest(above=0)
    assert newest is not None
    assert newest.key == 3, "only one that was promised its place is left of the last class"
    assert queue.newest(above=1) is None


def test_the_work_before_a_request_is_what_goes_before_it() -> None:
    draw = random.Random(5)
    bookings = [
        booking(key, draw.choice("abc"), tokens=float(draw.randint(50, 600)), priority=draw.randint(0, 1))
        for key in range(120)
    ]
    queue = queue_of(*bookings)
    foretold = {one.key: queue.work_before(one) for one in bookings}
    in_order = list(queue.in_order())
    gone_s = 0.0
    for one, (next_one, before_s) in zip(drain(queue), in_order, strict=True):
        assert one is next_one
        assert before_s == pytest.approx(gone_s)
        # Of each other tenant, the request that is begun before it: no more is uncertain.
        assert abs(foretold[one.key] - gone_s) < 1.3, one.key
        gone_s += one.work_s
    newcomer = booking(999, "new")
    assert queue.work_before(newcomer) == 0.0
