from __future__ import annotations

from app.balancer.availability import Availability
from app.balancer.fleet import Fleet
from app.transport.messages import LoadReport


def test_the_silent_the_draining_and_the_gone_are_not_chosen() -> None:
    fleet = Fleet()
    availability = Availability(fleet, stale_after_s=5.0)
    for name in ("a", "b", "c"):
        availability.heard(fleet.add(name, 16, LoadReport(), 0.0), 0.0)
    assert availability.bitmap(1.0) == 0b111
    availability.drain(0)
    availability.heard(0, 2.0)
    assert availability.bitmap(2.0) == 0b110
    availability.heard(1, 4.0)
    assert availability.bitmap(5.5) == 0b010
    availability.heard(2, 6.0)
    assert availability.bitmap(6.0) == 0b110
    assert availability.bitmap(9.5) == 0b100
    availability.forget(2)
    fleet.remove("c")
    # b, silent since 4.0, is all that is left.
    assert availability.bitmap(9.6) == 0b010
    # Whoever gets the slot of one that drained drains not.
    availability.forget(0)
    fleet.remove("a")
    slot = fleet.add("d", 16, LoadReport(), 9.6)
    availability.heard(slot, 9.6)
    assert availability.bitmap(9.6) == 1 << slot


def test_if_all_are_silent_all_but_the_draining_can_be_chosen_until_one_is_heard() -> None:
    fleet = Fleet()
    availability = Availability(fleet, stale_after_s=5.0)
    for name in ("a", "b", "c", "d"):
        availability.heard(fleet.add(name, 16, LoadReport(), 0.0), 0.0)
    availability.drain(3)
    assert availability.bitmap(5.0) == 0b0111
    assert availability.bitmap(50.0) == 0b0111
    availability.drain(0)
    assert availability.bitmap(51.0) == 0b0110
    availability.heard(1, 52.0)
    assert availability.bitmap(52.0) == 0b0010
    # The one that lives goes: the silent one is better than nobody.
    availability.forget(1)
    fleet.remove("b")
    assert availability.bitmap(52.0) == 0b0100
    availability.drain(2)
    assert availability.bitmap(53.0) == 0
