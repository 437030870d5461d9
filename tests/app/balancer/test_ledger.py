from __future__ import annotations

from dataclasses import replace

from app.balancer.booking import Booking
from app.balancer.cost import RequestCost
from app.balancer.fleet import Fleet
from app.balancer.ledger import Ledger
from app.transport.messages import LoadReport

LOAD = LoadReport(num_blocks=100, num_free_blocks=100, prefill_tokens_per_s=1000.0)


def booking(key: int, tokens: int) -> Booking:
    return Booking(key, RequestCost(tokens, 1), frozenset(), 0.0, 0.0, prefill_s=tokens / 1000.0)


def put(fleet: Fleet, ledger: Ledger, placed: Booking, slot: int, now: float) -> None:
    placed.slot, fleet.now = slot, now
    fleet.take_on(placed)
    ledger.put(placed, now)


def test_a_booking_adds_to_a_replica_until_its_report_includes_it() -> None:
    fleet = Fleet()
    ledger = Ledger(fleet)
    slot = fleet.add("a", 16, LOAD, 10.0)
    ledger.open("a")
    put(fleet, ledger, booking(1, 500), slot, 10.0)
    second = booking(2, 100)
    put(fleet, ledger, second, slot, 10.0)
    assert (fleet.free_at[slot], fleet.num_sequences[slot], fleet.num_blocks_taken[slot]) == (10.6, 2, 39)
    ledger.admit("a", (1, 77))
    fleet.loads[slot] = replace(LOAD, num_waiting=1, num_waiting_tokens=450)
    ledger.recount(slot, "a", 10.05)
    assert (fleet.free_at[slot], fleet.num_sequences[slot], fleet.num_blocks_taken[slot]) == (10.6, 2, 7)
    ledger.take(second)
    ledger.take(second)
    assert (fleet.free_at[slot], fleet.num_sequences[slot], fleet.num_blocks_taken[slot]) == (10.5, 1, 0)
    assert ledger.keys_at("a") == [1]


def test_a_replica_that_goes_leaves_its_bookings_unplaced() -> None:
    fleet = Fleet()
    ledger = Ledger(fleet)
    slot = fleet.add("a", 16, LOAD, 0.0)
    ledger.open("a")
    placed = booking(1, 100)
    put(fleet, ledger, placed, slot, 0.0)
    assert ledger.close("a") == [1]
    assert placed.replica_id is None
    assert ledger.keys_at("a") == []
