"""Which replicas can be chosen: those that have been heard from lately and do not drain.

If none has been, the fault may be the listener's as well as theirs: all that do not drain can be chosen, until one is
heard from.
"""

from __future__ import annotations

import math

from app.balancer.fleet import Fleet


class Availability:
    """A bitmap of slots, looked through again only when a replica may have fallen silent.

    Args:
        stale_after_s: a replica not heard from for longer is not chosen, unless that goes for all.
    """

    def __init__(self, fleet: Fleet, stale_after_s: float) -> None:
        self._fleet = fleet
        self._stale_after_s = stale_after_s
        self._draining: set[int] = set()
        self._bits = 0
        self._until = -math.inf
        self._all_silent = False

    def heard(self, slot: int, now: float) -> None:
        """A replica lives."""
        self._fleet.heard_at[slot] = now
        bit = 1 << slot
        if self._all_silent:
            self._until = -math.inf
        if not self._bits & bit and slot not in self._draining:
            self._bits |= bit

    def drain(self, slot: int) -> None:
        """Choose it no more."""
        self._draining.add(slot)
        self._clear(slot)

    def is_draining(self, slot: int) -> bool:
        """Whether it is not to be chosen although it lives."""
        return slot in self._draining

    def forget(self, slot: int) -> None:
        """It is gone; its slot may stand for another one."""
        self._draining.discard(slot)
        self._clear(slot)

    def bitmap(self, now: float) -> int:
        """The slots to choose from."""
        if now > self._until:
            oldest = now
            bits = 0
            for slot in self._fleet.slots():
                heard_at = self._fleet.heard_at[slot]
                if heard_at >= now - self._stale_after_s and slot not in self._draining:
                    bits |= 1 << slot
                    oldest = min(oldest, heard_at)
            self._until = oldest + self._stale_after_s
            self._all_silent = not bits
            if self._all_silent:
                bits = sum(1 << slot for slot in self._fleet.slots() if slot not in self._draining)
                # Nobody can fall silent any more.
                self._until = math.inf
            self._bits = bits
        return self._bits

    def _clear(self, slot: int) -> None:
        self._bits &= ~(1 << slot)
        if not self._bits:
            self._until = -math.inf
