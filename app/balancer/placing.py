"""Puts bookings on replicas: which may take one, which is best, and what that makes of the fleet's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from app.balancer.availability import Availability
from app.balancer.booking import Booking
from app.balancer.fleet import Fleet
from app.balancer.ledger import Ledger
from app.balancer.placer import Placer


class Placing:
    """What all ways of waiting share. Under the balancer's lock."""

    def __init__(self, fleet: Fleet, placer: Placer, availability: Availability, ledger: Ledger) -> None:
        self.fleet = fleet
        self.ledger = ledger
        self._placer = placer
        self._availability = availability

    def available(self, now: float) -> int:
        """Replicas that a request could be placed on, a bitmap."""
        return self._availability.bitmap(now)

    def bits(self, replica_ids: Iterable[str]) -> int:
        """The bitmap of those of these replicas that are known."""
        slots = (self.fleet.slot_of(replica_id) for replica_id in replica_ids)
        return sum(1 << slot for slot in slots if slot is not None)

    def willing(self, booking: Booking, now: float) -> int:
        """Replicas that may be chosen for it, a bitmap. None are excluded because they have refused if all have."""
        allowed = self._availability.bitmap(now)
        if booking.excluded:
            allowed &= ~self.bits(booking.excluded)
        willing = allowed
        if booking.refused_by:
            willing &= ~self.bits(booking.refused_by)
        if not willing:
            booking.refused_by = frozenset()
            willing = allowed
        return willing

    def place(
        self, booking: Booking, among: int, now: float, hold_s: float = math.inf, *, reserves: bool = False
    ) -> bool:
        """Place it on the best of `among` unless it would wait for longer than `hold_s` there: see Placer.place."""
        self.fleet.now = now
        if not self._placer.place(booking, among, hold_s, reserves=reserves):
            return False
        self.ledger.put(booking, now)
        return True

    def unreserve(self) -> None:
        """Forget what was reserved."""
        self._placer.unreserve()
