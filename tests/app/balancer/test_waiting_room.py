from __future__ import annotations

import pytest

from app.balancer.booking import Booking
from app.balancer.waiting_room import WaitingRoom
from tests.app.balancer.test_fair_queue import booking


def room_of(*bookings: Booking) -> WaitingRoom:
    room = WaitingRoom()
    for one in bookings:
        room.add(one)
    return room


def test_the_window_is_part_of_the_room() -> None:
    room = room_of(*(booking(key) for key in range(5)))
    room.fill_window(8)
    assert [one.key for one in room.in_turn(0.0)] == [0, 1]
    assert len(room) == len(list(room)) == 5
    assert room.work_s == pytest.approx(0.5)
    assert room.num_tokens == pytest.approx(500.0)
    keys, before_s = zip(*((one.key, work_s) for one, work_s in room.in_order()), strict=True)
    assert keys == (0, 1, 2, 3, 4)
    assert before_s == pytest.approx((0.0, 0.0, 0.2, 0.3, 0.4))


def test_whoever_goes_before_one_in_the_window_comes_into_it() -> None:
    room = room_of(booking(1, priority=1))
    room.fill_window(1)
    urgent = booking(2, priority=0)
    assert room.goes_first(urgent)
    room.add(urgent)
    room.fill_window(1)
    assert [one.key for one in room.in_turn(0.0)] == [2, 1]
    assert not room.goes_first(booking(3, priority=0))


def test_a_tenant_is_due_while_others_are_in_the_window_alone() -> None:
    room = room_of(*(booking(key, "flood") for key in range(4)))
    for _ in range(3):
        room.fill_window(1)
        room.sent(room.in_turn(0.0)[0])
    room.fill_window(1)
    calm = booking(10, "calm")
    assert room.goes_first(calm)
    assert room.is_due(calm)
    more = booking(11, "flood")
    room.goes_first(more)
    assert not room.is_due(more), "it has had more than any other"


def test_nobody_is_due_where_nobody_else_waits() -> None:
    room = room_of(*(booking(key) for key in range(4)))
    room.fill_window(1)
    room.sent(room.in_turn(0.0)[0])
    own = booking(10)
    room.goes_first(own)
    assert not room.is_due(own)


def test_who_is_sent_past_the_room_pays_as_the_others_do() -> None:
    room = room_of(*(booking(key, tenant) for key, tenant in enumerate("ab")))
    room.sent(booking(9, "a", tokens=150.0))
    room.fill_window(1)
    assert [one.terms.tenant for one in room.in_turn(0.0)] == ["b"]


def test_a_restart_gives_all_their_whole_deadline() -> None:
    room = room_of(*(booking(key, deadline=float(key + 1)) for key in range(3)))
    room.fill_window(4)
    room.restart(50.0)
    assert all(one.deadline_at == 50.0 + one.terms.ttft_deadline_s for one in room)
    assert len(room) == 3
