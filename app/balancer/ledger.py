"""Which bookings lie on which replica, and what they add to its load until its own reports include them."""

from __future__ import annotations

from collections.abc import Iterable

from app.balancer.booking import Booking
from app.balancer.cost import adapter_s
from app.balancer.fleet import Fleet


class Ledger:
    """Keeps the fleet's numbers: what a replica has reported, and after it the bookings that the report lacks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._placed: dict[str, dict[int, Booking]] = {}
        self._unreported: dict[str, dict[int, Booking]] = {}

    def open(self, replica_id: str) -> None:
        """A new replica, with no bookings."""
        self._placed[replica_id], self._unreported[replica_id] = {}, {}

    def close(self, replica_id: str) -> list[int]:
        """A replica is gone, and with it all that the fleet knew of it. Returns its bookings, unplaced now."""
        del self._unreported[replica_id]
        placed = self._placed.pop(replica_id)
        for booking in placed.values():
            booking.replica_id = None
            booking.is_expected = False
        return list(placed)

    def keys_at(self, replica_id: str) -> list[int]:
        """The bookings placed on a replica."""
        return list(self._placed.get(replica_id, ()))

    def put(self, booking: Booking, now: float) -> None:
        """Enter a booking that the fleet has taken on at its slot."""
        fleet, slot, cost = self._fleet, booking.slot, booking.cost
        booking.replica_id = fleet.replica_ids[slot]
        booking.predicted_adapter_s = adapter_s(cost, fleet.load_of(slot, cost.adapter)) if cost.adapter else 0.0
        fleet.adapters.expect(slot, cost.adapter)
        booking.reported = False
        booking.booked_at = now
        booking.is_expected = True
        self._placed[booking.replica_id][booking.key] = booking
        self._unreported[booking.replica_id][booking.key] = booking
        self._fleet.check_full(booking.slot)

    def take(self, booking: Booking) -> None:
        """Undo `put` and what the fleet took on, as far as no report includes it. One placed nowhere is no error."""
        replica_id, slot = booking.replica_id, booking.slot
        if replica_id is None:
            return
        self.computed(booking)
        booking.replica_id = None
        del self._placed[replica_id][booking.key]
        if not booking.reported:
            fleet = self._fleet
            del self._unreported[replica_id][booking.key]
            fleet.num_sequences[slot] -= booking.cost.num_sequences
            fleet.num_blocks_taken[slot] -= booking.num_new_blocks
            fleet.set_free_at(slot, fleet.free_at[slot] - booking.prefill_s)
            fleet.check_full(slot)

    def computed(self, booking: Booking) -> None:
        """A prompt has been computed: its blocks are published by now."""
        if booking.is_expected:
            self._fleet.stop_expecting(booking)
            self._fleet.adapters.stop_expecting(booking.slot, booking.cost.adapter)
            booking.is_expected = False

    def admit(self, replica_id: str, keys: Iterable[int]) -> None:
        """A replica's report includes these bookings, among others that are none of ours."""
        unreported = self._unreported[replica_id]
        for key in keys:
            booking = unreported.pop(key, None)
            if booking is not None:
                booking.reported = True

    def recount(self, slot: int, replica_id: str, reported_at: float) -> None:
        """A replica's queue from its last report, and after it the bookings that the report does not include."""
        fleet = self._fleet
        load = fleet.loads[slot]
        rate = fleet.rates(slot)[0]
        free_at = reported_at + load.num_waiting_tokens / rate
        num_sequences = num_blocks = 0
        for booking in self._unreported[replica_id].values():
            free_at = max(free_at, booking.booked_at) + booking.uncached_tokens / rate
            num_sequences += booking.cost.num_sequences
            num_blocks += booking.num_new_blocks
        fleet.set_load(slot, load, free_at, num_sequences, num_blocks)
