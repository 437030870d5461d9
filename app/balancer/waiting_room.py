"""Those who wait at an ingress: behind, the FairQueue; in front, a window of those whose turn it is.

Those in the window are held until a replica is free for them; those behind it can still be overtaken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from app.balancer.booking import Booking
from app.balancer.fair_queue import FairQueue

# In the window are so many, at least, and one for four replicas.
_MIN_WINDOW = 1
_MAX_WINDOW = 32


class WaitingRoom:
    """Not thread-safe: the balancer's lock guards it.

    Args:
        turn: orders those in the window, the least first; without it the FairQueue does.
    """

    def __init__(self, turn: Callable[[Booking, float], float] | None = None) -> None:
        self._turn = turn
        self._queue = FairQueue()
        self._window: dict[int, Booking] = {}

    def __len__(self) -> int:
        return len(self._queue) + len(self._window)

    def __iter__(self) -> Iterator[Booking]:
        yield from self._window.values()
        yield from self._queue

    @property
    def work_s(self) -> float:
        """Replica-seconds of all who wait."""
        return self._queue.work_s + sum(booking.work_s for booking in self._window.values())

    @property
    def num_tokens(self) -> float:
        """Tokens of all who wait."""
        return self._queue.num_tokens + sum(booking.num_tokens for booking in self._window.values())

    def set_credit(self, credit_s: float) -> None:
        """Replica-seconds that a tenant may be ahead of its share; see FairQueue."""
        self._queue.credit_s = credit_s

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Of tenants that are to have more or less than others."""
        self._queue.set_weights(weights)

    # Who comes

    def goes_first(self, booking: Booking) -> bool:
        """Whether nobody waits who goes before one that has just come. Its `turn` is set."""
        priority = booking.terms.priority
        if self._turn is not None:
            return not (
                any(other <= priority for other in self._queue.priorities)
                or any(one.terms.priority <= priority for one in self._window.values())
            )
        booking.turn = self._queue.turn_of(booking)
        place = (priority, booking.turn)
        return not (
            any((other, self._queue.next_turn(other)) <= place for other in self._queue.priorities)
            or any((one.terms.priority, one.turn) <= place for one in self._window.values())
        )

    def is_due(self, booking: Booking) -> bool:
        """Whether it is of a tenant that has asked for no more than its share, while others of its class wait."""
        if self._turn is not None or not self._queue.has_had_less(booking):
            return False
        terms = booking.terms
        return self._queue.has_others(booking) or any(
            one.terms.priority == terms.priority and one.terms.tenant != terms.tenant for one in self._window.values()
        )

    def ahead_s(self, booking: Booking) -> float:
        """Replica-seconds of those who go before it, whether it waits or has just come."""
        turn = (booking.terms.priority, self._queue.turn_of(booking))
        window_s = sum(one.work_s for one in self._window.values() if (one.terms.priority, one.turn) <= turn)
        return window_s + self._queue.work_before(booking)

    def add(self, booking: Booking) -> None:
        """Let it wait by its terms, `work_s`, `num_tokens` and `deadline_at`."""
        self._queue.add(booking)

    # Who goes next

    def fill_window(self, num_replicas: int) -> None:
        """Take those whose turn it is into the window, by priority."""
        # An order of its own needs some to choose from.
        size = min(max(_MIN_WINDOW, num_replicas // 4), _MAX_WINDOW) if self._turn is None else _MAX_WINDOW
        for priority in self._queue.priorities:
            # Those of a lower priority that are in the window take no place from it.
            inside = [one for one in self._window.values() if one.terms.priority <= priority]
            # Whoever goes before one in the window belongs there, too, unless that has another order.
            ours = [one.turn for one in inside if one.terms.priority == priority and self._turn is None]
            last = max(ours, default=-math.inf)
            room = size - len(inside)
            while room > 0 or (room > -_MAX_WINDOW and self._queue.next_turn(priority) < last):
                booking = self._queue.pop(priority)
                if booking is None:
                    break
                self._window[booking.key] = booking
                room -= 1

    def in_turn(self, now: float) -> list[Booking]:
        """The window, in the order in which a replica is to be looked for."""
        turn = self._turn
        if turn is None:
            return sorted(
                self._window.values(), key=lambda booking: (booking.terms.priority, booking.turn, booking.key)
            )
        return sorted(self._window.values(), key=lambda booking: (booking.terms.priority, turn(booking, now)))

    def in_order(self) -> Iterator[tuple[Booking, float]]:
        """All who wait, each with the work that goes before it; those in the window may go at any time."""
        for booking in self._window.values():
            yield booking, 0.0
        window_s = sum(one.work_s for one in self._window.values())
        for booking, before_s in self._queue.in_order():
            yield booking, window_s + before_s

    def pop(self) -> Booking | None:
        """Take out the first of all, for whom no replica is looked for; its tenant pays for it."""
        booking = next(iter(self._window.values()), None) or self._queue.pop()
        if booking is not None:
            self._window.pop(booking.key, None)
            self._queue.sent(booking)
        return booking

    def victim(self, above: int) -> Booking | None:
        """Who is to go when somebody must: the newest of the last priority, if that comes after `above`, and at last
        one in the window. Those who were told to come now stay."""
        victim = self._queue.newest(above)
        if victim is None:
            outranked = [one for one in self._window.values() if one.terms.priority > above and not one.promised]
            victim = max(outranked, key=lambda one: (one.terms.priority, one.key), default=None)
        return victim

    # Who leaves

    def sent(self, booking: Booking) -> None:
        """It goes to a replica, from the window or past all who wait; its tenant pays for it."""
        if self._window.pop(booking.key, None) is not None:
            self._queue.sent(booking)
        elif len(self) and not booking.resumes:
            self._queue.overtaken(booking)
            self.remove(booking)

    def remove(self, booking: Booking) -> None:
        """It waits no more, if it did."""
        if self._window.pop(booking.key, None) is not None:
            self._queue.refund(booking)
        elif booking in self._queue:
            self._queue.remove(booking)

    def restart(self, now: float) -> None:
        """Deadlines count from now on."""
        queued = sorted(self._queue, key=lambda booking: booking.key)
        for booking in queued:
            self._queue.remove(booking)
        for booking in (*queued, *self._window.values()):
            booking.deadline_at = now + booking.terms.ttft_deadline_s
        for booking in queued:
            self._queue.add(booking)
