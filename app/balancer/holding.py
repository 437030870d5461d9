"""Requests held back: all replicas that are worth it for them have prompts to compute first."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush, nsmallest

from app.balancer.booking import Booking
from app.balancer.fleet import Fleet

# No more are held: what comes then is placed at once, so that a decision's cost does not grow with the queue.
_MAX_HELD = 64
# In larger fleets none are held. Past _MAX_TRIED a held request is looked at only when the replica that it last wanted
# comes free, and the more replicas there are, the more often another would have served it sooner. Measured: a gain at
# 128 replicas, about even at 256 with a worse p99, a loss at 512 (docs/benchmarks.md).
_MAX_REPLICAS = 128
# Held for so many seconds a request is placed wherever it is best: when more come than can be served, those placed at
# once for want of room here keep every replica busy, and none would come free.
_LONGEST_HELD_S = 30.0
# If no more than this are held, all are looked at whenever one may go; else so many of those who want a replica.
_MAX_TRIED = 32
_MAX_TRIED_A_SLOT = 2
# Seconds of prompt by which a held request counts as shorter for each second that it has waited.
_AGEING = 0.3
# Prompts longer than this count as this long among those held, or the longest would wait for all others.
_LONGEST_S = 3.0
# A first token is late if so few come later. A request that will be among the last before that counts as shorter by
# _LATE for each second beyond _NEAR of it; one that is late in any case has nothing to lose.
_LATE_SHARE = 0.01
_LATE = 0.5
_NEAR = 0.6
_STEP = 0.02


class Holding:
    """Held bookings in the order in which they may go: the shortest prompt first, and long ones as time passes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._held: dict[int, Booking] = {}
        # The same by the slot that each wants; the fleet tells when one of these moves.
        self._wanting: dict[int, dict[int, Booking]] = {}
        fleet.watched = self._wanting
        self._late_s = 0.0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def prefill_s(self) -> float:
        """Seconds that their prompts take, each on the replica that it wants."""
        return sum(booking.prefill_s for booking in self._held.values())

    def has_room_for(self, booking: Booking, now: float) -> bool:
        """Whether it may be held, or held on."""
        if len(self._fleet) > _MAX_REPLICAS or _is_overdue(booking, now):
            return False
        return booking.held or len(self._held) < _MAX_HELD

    def add(self, booking: Booking, slot: int) -> None:
        """Hold it, or hold it on, until it can go to this slot or a better one."""
        if booking.held and booking.wanted_slot != slot:
            self.remove(booking)
        booking.held = True
        booking.wanted_slot = slot
        self._held[booking.key] = booking
        self._wanting.setdefault(slot, {})[booking.key] = booking
        self._fleet.num_held = len(self._held)
        heappush(self._fleet.moves, (self._fleet.free_at[slot], slot))

    def remove(self, booking: Booking) -> None:
        """Hold it no longer. One that is not held is no error."""
        if booking.held:
            booking.held = False
            del self._held[booking.key]
            self._fleet.num_held = len(self._held)
            wanting = self._wanting[booking.wanted_slot]
            del wanting[booking.key]
            if not wanting:
                del self._wanting[booking.wanted_slot]

    def placed(self, first_token_s: float) -> None:
        """A request was sent on its way; so long after its arrival it will have its first token."""
        if not self._late_s:
            self._late_s = first_token_s
        late = first_token_s > self._late_s
        self._late_s *= 1.0 + _STEP * (1.0 - _LATE_SHARE if late else -_LATE_SHARE)

    def to_try(self, before: float, now: float) -> list[Booking]:
        """Those for whom a replica may come free before that time, in their order.

        All, if they are few. Of many, the first of those who want a replica that does, for the others nothing has
        become better; and those held for too long.
        """
        waiting: Iterable[Booking] = self._held.values()
        slots = self._free_slots(before)
        if len(self._held) > _MAX_TRIED:
            waiting = []
            for slot in slots:
                wanting = self._wanting[slot].values()
                waiting += nsmallest(_MAX_TRIED_A_SLOT, wanting, key=lambda booking: self.turn(booking, now))
                # Whether the slot is still free then, for the others of them, will be seen.
                heappush(self._fleet.moves, (before, slot))
            found = {booking.key for booking in waiting}
            waiting += [one for one in self._held.values() if _is_overdue(one, now) and one.key not in found]
        return sorted(waiting, key=lambda booking: self.turn(booking, now))

    def next_at(self, after: float) -> float:
        """When `to_try` may find something, for a time after which that is worth while."""
        if len(self._held) <= _MAX_TRIED:
            first = self._fleet.order.first_after(after)
            return first if first is not None else after
        moves, free_at = self._fleet.moves, self._fleet.free_at
        while moves[0][1] not in self._wanting or free_at[moves[0][1]] > moves[0][0]:
            heappop(moves)
        return moves[0][0]

    def overdue_at(self) -> float:
        """When the first of them will have been held for too long."""
        return min(booking.arrived_at for booking in self._held.values()) + _LONGEST_HELD_S

    def _free_slots(self, before: float) -> set[int]:
        """Wanted slots that are free by then. What was held on for one of them puts it on the heap again."""
        moves, free_at = self._fleet.moves, self._fleet.free_at
        found = set()
        while moves and moves[0][0] <= before:
            slot = heappop(moves)[1]
            if slot in self._wanting and free_at[slot] <= before:
                found.add(slot)
        return found

    def turn(self, booking: Booking, now: float) -> float:
        """By which they go, the least first: seconds of prompt, less what waiting earns."""
        waited_s = now - booking.arrived_at
        turn = min(booking.prefill_s, _LONGEST_S) - _AGEING * waited_s
        first_token_s = waited_s + booking.prefill_s
        if _NEAR * self._late_s < first_token_s < self._late_s:
            turn -= _LATE * (first_token_s - _NEAR * self._late_s)
        return turn


def _is_overdue(booking: Booking, now: float) -> bool:
    return now >= booking.arrived_at + _LONGEST_HELD_S
