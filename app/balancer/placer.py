"""Chooses a replica for a request and books it there, in one go: the seam between the balancer and its C++ core."""

from __future__ import annotations

import logging
import math

from app.balancer.booking import Booking
from app.balancer.fleet import Fleet
from app.balancer.policy import Choice, Policy

logger = logging.getLogger(__name__)


class Placer:
    """Any policy over any fleet; `native.NativePlacer` does the same for the default policy in C++."""

    def __init__(self, policy: Policy, fleet: Fleet) -> None:
        self.policy = policy
        self._fleet = fleet
        self._reserved: list[tuple[int, float]] = []

    def place(self, booking: Booking, among: int, hold_s: float = math.inf, *, reserves: bool = False) -> bool:
        """Choose for a booking, as of the fleet's `now`, and take it on unless it would wait too long there.

        Sets its `slot` and what the choice rested on.

        Args:
            among: the slots to choose from, a bitmap; at least one.
            hold_s: a longer wait than this for queued prompts is not taken on.
            reserves: what is not still makes the slot's queue longer, until `unreserve`.
        """
        fleet = self._fleet
        slot, num_cached_blocks, cost_s = self._choose(booking, among)
        booking.slot, booking.num_cached_blocks, booking.predicted_cost_s = slot, num_cached_blocks, cost_s
        booking.predicted_wait_s = max(fleet.free_at[slot] - fleet.now, 0.0)
        booking.prefill_s = booking.uncached_tokens / fleet.prefill_rates[slot]
        if booking.predicted_wait_s > hold_s:
            if reserves:
                self._reserved.append((slot, fleet.free_at[slot]))
                fleet.queue_prompt(slot, booking.prefill_s, fleet.now)
            return False
        fleet.take_on(booking)
        self.policy.placed(booking.prefill_s)
        return True

    def unreserve(self) -> None:
        """Forget what was reserved."""
        for slot, free_at in reversed(self._reserved):
            self._fleet.set_free_at(slot, free_at)
        self._reserved.clear()

    def _choose(self, booking: Booking, among: int) -> Choice:
        try:
            choice = self.policy.choose(booking.cost, self._fleet, among)
            if choice.slot >= 0 and among >> choice.slot & 1:
                return choice
            raise IndexError(f"it chose slot {choice.slot}, which is no candidate")
        except Exception:
            # A fault in a policy costs balance, never a request.
            logger.exception("balancing policy %s failed; taking the emptiest replica", type(self.policy).__name__)
            return Choice(self._fleet.emptiest(among), 0, 0.0)
