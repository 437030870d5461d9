from __future__ import annotations

import pytest

from app.balancer.reservations import MAX_PROMISES, SHARE, Reservations


def test_no_two_are_told_the_same_part_of_what_is_served() -> None:
    book = Reservations()
    told = [book.promise(key, "a", 100.0, earliest_s=2.0, work_s=0.5, rate=4.0) for key in range(1, 101)]
    assert told == sorted(told)
    assert told[0] == 3
    # Half a replica-second each, of a share of four a second.
    assert told[-1] == pytest.approx(2.0 + 100 * 0.5 / (4.0 * SHARE), abs=1.0)
    assert len(book) == 100


def test_who_comes_when_told_is_known_once() -> None:
    book = Reservations()
    after_s = book.promise(7, "a", 0.0, 1.0, 1.0, 1.0)
    assert not book.claim(7, after_s - 1.0)
    assert not book.claim(8, after_s + 0.5)
    assert book.claim(7, after_s + 0.5)
    assert not book.claim(7, after_s + 0.6)
    assert len(book) == 0


def test_alike_requests_have_a_promise_each() -> None:
    book = Reservations()
    told = [book.promise(7, "a", 0.0, 1.0, 1.0, 1.0) for _ in range(3)]
    assert len(set(told)) == 3
    assert book.claim(7, told[0])
    assert not book.claim(7, told[0])
    assert book.claim(7, told[1])


def test_the_later_the_promise_the_later_it_may_be_claimed() -> None:
    book = Reservations()
    book.promise(2, "a", 0.0, 0.0, 0.01, 1.0)
    book.promise(1, "a", 0.0, 99.5, 0.01, 1.0)
    assert book.claim(1, 120.0)
    assert not book.claim(2, 120.0)
    assert len(book) == 0, "nobody waits for ever for who does not come"


def test_work_that_is_due_counts_as_far_as_they_come() -> None:
    book = Reservations()
    for key in range(1, 51):
        book.promise(key, "a", 0.0, 1.0, 0.3, 10.0)
    assert book.due_work_s("a", 0.0, 60.0) == pytest.approx(15.0)
    assert 0.0 < book.due_work_s("a", 0.0, 3.0) < 15.0
    # None of them comes: less and less is expected of the next ones.
    assert book.due_work_s("a", 30.0, 60.0) == 0.0
    assert book.attendance < 0.5
    book.promise(99, "a", 30.0, 1.0, 1.0, 10.0)
    assert book.due_work_s("a", 30.0, 60.0) == pytest.approx(book.attendance)


def test_a_request_that_cannot_be_known_is_told_a_time_and_not_waited_for() -> None:
    book = Reservations()
    assert book.promise(0, "a", 0.0, 4.0, 1.0, 1.0) > 4
    assert len(book) == 0
    assert not book.claim(0, 10.0)


def test_it_is_bounded() -> None:
    book = Reservations()
    for key in range(1, MAX_PROMISES + 100):
        book.promise(key, "a", 0.0, 1.0, 0.001, 100.0)
    assert len(book) == MAX_PROMISES


def test_another_ingress_knows_who_was_told_to_come() -> None:
    first, second = Reservations(), Reservations()
    after_s = first.promise(7, "a", 1000.0, 1.0, 1.0, 1.0)
    # Their clocks need not agree.
    second.hear(first.take_news(1000.5), 20.5)
    assert first.take_news(1000.6).made == []
    assert second.claim(7, 20.0 + after_s)
    first.hear(second.take_news(25.0), 1005.0)
    assert len(first) == len(second) == 0
    assert not first.claim(7, 1000.0 + after_s)


def test_a_tenant_is_not_told_to_come_after_all_of_a_flood() -> None:
    book = Reservations()
    flood = [book.promise(key, "flood", 0.0, 1.0, 1.0, 1.0) for key in range(1, 101)]
    calm = book.promise(999, "calm", 0.0, 1.0, 1.0, 1.0)
    assert calm < 10 < flood[-1]
    assert book.promise(1000, "flood", 0.0, 1.0, 1.0, 1.0) > flood[-1] + 3
    # Nor does what the flood was promised stand before it, but for a share.
    assert book.due_work_s("flood", 0.0, 600.0) > 100.0
    assert book.due_work_s("calm", 0.0, 600.0) == 2.0
    assert book.due_work_s("other", 0.0, 600.0) == 0.0


def test_a_tenant_whose_times_have_passed_takes_no_share() -> None:
    told = {}
    for num_others, now in ((0, 0.0), (50, 0.0), (50, 500.0)):
        book = Reservations()
        for other in range(num_others):
            # Twice, so that what is promised to it reaches further than at first.
            assert book.promise(2 * other + 1, f"t{other}", 0.0, 1.0, 1.0, 1.0) < 250
            assert book.promise(2 * other + 2, f"t{other}", 0.0, 1.0, 1.0, 1.0) < 500
        told[num_others, now] = book.promise(10_000, "honest", now, 1.0, 1.0, 1.0)
    assert told[50, 0.0] > 10 * told[0, 0.0]
    # Fewer are expected, too: none of them has come.
    assert told[50, 500.0] <= told[0, 0.0]
