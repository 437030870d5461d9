"""How requests wait in the balancer: the seam between it and its two ways, and the one without admission."""

from __future__ import annotations

import math
from typing import Protocol

from app.balancer.booking import Booking, Placement
from app.balancer.holding import Holding
from app.balancer.placing import Placing
from app.balancer.terms import Refusal


class Waiting(Protocol):
    """Takes bookings at their arrival, and places those that wait. Under the balancer's lock."""

    def __len__(self) -> int:
        """Those that wait."""
        ...

    @property
    def work_s(self) -> float:
        """Replica-seconds of work that they will take."""
        ...

    def arrive(self, booking: Booking, now: float) -> Placement:
        """Place it, let it wait or refuse it."""
        ...

    def place(self, booking: Booking, now: float) -> Placement:
        """Place it if any replica may take it, however long it waits there."""
        ...

    def dispatch(self, now: float) -> list[int]:
        """Place those that a replica has become free for; their keys."""
        ...

    def next_dispatch_s(self, now: float) -> float | None:
        """Seconds until `dispatch` may find something to do, as far as can be foreseen; None if nothing waits."""
        ...

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """Those that have waited and are refused since the last call."""
        ...

    def computed(self, booking: Booking, now: float) -> None:
        """A prompt has been computed."""
        ...

    def remove(self, booking: Booking) -> None:
        """It waits no more. One that does not is no error."""
        ...


class HoldingBack:
    """Without admission: whoever would wait on the best replica for longer than `hold_s` waits here, and nobody is
    refused. None: everybody is placed at once.
    """

    def __init__(self, placing: Placing, hold_s: float | None) -> None:
        self._placing = placing
        self._hold_s = hold_s
        self._holding = Holding(placing.fleet)

    def __len__(self) -> int:
        return len(self._holding)

    @property
    def work_s(self) -> float:
        """Replica-seconds of the prompts that wait."""
        return self._holding.prefill_s

    def arrive(self, booking: Booking, now: float) -> Placement:
        """Place it, or hold it back."""
        return self._place(booking, now, may_hold=True)

    def place(self, booking: Booking, now: float) -> Placement:
        """Place it if any replica may take it."""
        return self._place(booking, now, may_hold=False)

    def dispatch(self, now: float) -> list[int]:
        """Place those that a replica has become free for; their keys."""
        if self._hold_s is None:
            return []
        # Of those held on, the next in turn must see that they go first.
        try:
            return [
                booking.key
                for booking in self._holding.to_try(now + self._hold_s, now)
                if not self._place(booking, now, may_hold=True, reserves=True).held
            ]
        finally:
            self._placing.unreserve()

    def next_dispatch_s(self, now: float) -> float | None:
        """Seconds until the next may go, or has waited for too long."""
        if not len(self._holding) or self._hold_s is None:
            return None
        next_at = min(self._holding.next_at(now + self._hold_s) - self._hold_s, self._holding.overdue_at())
        return max(next_at - now, 0.0)

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """None ever is."""
        return []

    def computed(self, booking: Booking, now: float) -> None:
        """Nothing waits for that."""

    def remove(self, booking: Booking) -> None:
        """Hold it no longer."""
        self._holding.remove(booking)

    def _place(self, booking: Booking, now: float, *, may_hold: bool, reserves: bool = False) -> Placement:
        willing = self._placing.willing(booking, now)
        if not willing:
            self._holding.remove(booking)
            return Placement(None, booking.num_moves)
        hold_s = math.inf
        if may_hold and self._hold_s is not None and self._holding.has_room_for(booking, now):
            hold_s = self._hold_s
        if not self._placing.place(booking, willing, now, hold_s, reserves=reserves):
            self._holding.add(booking, booking.slot)
            return Placement(None, booking.num_moves, True)
        self._holding.remove(booking)
        self._holding.placed(now - booking.arrived_at + booking.predicted_wait_s + booking.prefill_s)
        return Placement(booking.replica_id, booking.num_moves)
