from __future__ import annotations

from app.balancer.booking import Booking
from app.balancer.cost import RequestCost
from app.balancer.fleet import Fleet
from app.balancer.holding import Holding
from app.transport.messages import LoadReport


def fleet_of(num_replicas: int) -> Fleet:
    fleet = Fleet()
    for number in range(num_replicas):
        fleet.add(f"r{number}", 16, LoadReport(), 0.0)
    return fleet


def booking(key: int, prefill_s: float, arrived_at: float = 0.0) -> Booking:
    return Booking(key, RequestCost(1, 1), frozenset(), arrived_at, 0.0, prefill_s=prefill_s)


def order_of(holding: Holding, now: float) -> list[int]:
    return [one.key for one in holding.to_try(now, now)]


def test_the_shortest_goes_first_until_a_long_one_has_waited() -> None:
    holding = Holding(fleet_of(1))
    holding.add(booking(1, 20.0), 0)
    holding.add(booking(2, 0.5, arrived_at=1.0), 0)
    assert order_of(holding, 1.0) == [2, 1]
    # However long it is, it counts as a few seconds, less a part of those that it has waited.
    holding.add(booking(3, 0.5, arrived_at=9.0), 0)
    assert order_of(holding, 9.0) == [2, 1, 3]


def test_a_request_about_to_be_among_the_latest_goes_first_and_one_that_is_late_does_not() -> None:
    holding = Holding(fleet_of(1))
    for _ in range(1000):
        holding.placed(10.0)
    holding.add(booking(1, 2.0, arrived_at=0.0), 0)
    holding.add(booking(2, 9.0, arrived_at=0.0), 0)
    assert order_of(holding, 0.5) == [2, 1]
    assert order_of(holding, 2.0) == [1, 2]


def test_of_many_only_those_are_tried_whose_replica_is_free() -> None:
    fleet = fleet_of(3)
    for slot, free_at in enumerate((200.0, 90.0, 300.0)):
        fleet.set_free_at(slot, free_at)
    holding = Holding(fleet)
    bookings = [booking(key, 1.0, arrived_at=90.0 + key / 10) for key in range(90)]
    for key, one in enumerate(bookings):
        holding.add(one, key % 3)
    assert holding.next_at(0.0) == 90.0
    assert order_of(holding, 89.0) == []
    # The first two: if they go elsewhere, the next two come at once.
    assert order_of(holding, 100.0) == order_of(holding, 100.0) == [1, 4]
    for key in (1, 4):
        holding.remove(bookings[key])
        holding.remove(bookings[key])
    assert order_of(holding, 100.0) == [7, 10]
    holding.add(bookings[7], 0)
    assert order_of(holding, 100.0) == [10, 13]
    fleet.set_free_at(1, 110.0)
    assert order_of(holding, 100.0) == []
    assert holding.next_at(100.0) == 110.0
    # Its replica goes: those who wanted it are tried at once.
    fleet.remove("r2")
    assert order_of(holding, 100.0) == [2, 5]
    # Few are all tried.
    for one in bookings[30:]:
        holding.remove(one)
    assert order_of(holding, 0.0) == [key for key in range(30) if key not in (1, 4)]


def test_a_replica_that_comes_free_sooner_than_foretold_is_noticed() -> None:
    fleet = fleet_of(1)
    fleet.set_free_at(0, 50.0)
    holding = Holding(fleet)
    for key in range(64):
        assert holding.has_room_for(booking(key, 1.0), 0.0)
        holding.add(booking(key, 1.0, arrived_at=key), 0)
    assert holding.next_at(0.0) == 50.0
    fleet.set_free_at(0, 20.0)
    assert holding.next_at(0.0) == 20.0
    assert order_of(holding, 20.0) == [0, 1]
    assert not holding.has_room_for(booking(99, 1.0), 0.0)


def test_seconds_of_prompt_that_are_held() -> None:
    holding = Holding(fleet_of(1))
    one, other = booking(1, 0.5), booking(2, 2.0)
    holding.add(one, 0)
    holding.add(other, 0)
    assert holding.prefill_s == 2.5
    holding.remove(other)
    assert holding.prefill_s == 0.5


def test_nobody_is_held_for_ever() -> None:
    fleet = fleet_of(1)
    fleet.set_free_at(0, 1000.0)
    holding = Holding(fleet)
    bookings = [booking(key, 1.0, arrived_at=key) for key in range(40)]
    for one in bookings:
        holding.add(one, 0)
    assert holding.overdue_at() == 30.0
    assert order_of(holding, 29.0) == []
    assert order_of(holding, 31.0) == [0, 1]
    assert not holding.has_room_for(bookings[0], 31.0)
    assert holding.has_room_for(bookings[2], 31.0)


def test_a_fleet_in_which_some_replica_is_always_about_to_come_free_holds_nobody() -> None:
    fleet = fleet_of(128)
    holding = Holding(fleet)
    held, other = booking(1, 1.0), booking(2, 1.0)
    holding.add(held, 0)
    assert holding.has_room_for(held, 0.0)
    assert holding.has_room_for(other, 0.0)
    fleet.add("r128", 16, LoadReport(), 0.0)
    assert not holding.has_room_for(held, 0.0)
    assert not holding.has_room_for(other, 0.0)
    fleet.remove("r128")
    assert holding.has_room_for(other, 0.0)
