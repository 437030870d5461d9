from __future__ import annotations

import random

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


def test_a_request_of_many_quanta_is_not_counted_up_to_and_still_waits_its_turn() -> None:
    queue = queue_of(booking(1, "big", tokens=1e7), *(booking(key, "small") for key in range(2, 12)))
    assert [one.key for one in drain(queue)] == [*range(2, 12), 1]


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
    assert foretold == {one.key: before_s for one, before_s in queue.in_order()}
    gone_s = 0.0
    for one in drain(queue):
        # Turns of a quantum, and a request that is begun: no more is uncertain.
        assert abs(foretold[one.key] - gone_s) < 2.5, one.key
        gone_s += one.work_s
    newcomer = booking(999, "new")
    assert queue.work_before(newcomer) == 0.0
