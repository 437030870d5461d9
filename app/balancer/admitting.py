"""How requests wait in the balancer with admission: in turn, within bounds, and refused if it would be too late."""

from __future__ import annotations

import random

from app.balancer.admission import MAX_IN_SERVE, Admission
from app.balancer.admission_settings import AdmissionSettings
from app.balancer.booking import Booking, Placement
from app.balancer.holding import Holding
from app.balancer.placing import Placing
from app.balancer.terms import Refusal

# What waits makes cached prefixes worth more, up to so many requests.
_MAX_CROWD = 64
_LONGEST_POLL_S = 0.02


class Admitting:
    """As the protocol Waiting says.

    Args:
        hold_s: nobody is sent to a replica where it would wait for longer; None lets admission say so.
        draw: where chance comes from.
    """

    def __init__(
        self, placing: Placing, settings: AdmissionSettings, hold_s: float | None, draw: random.Random | None = None
    ) -> None:
        self._placing = placing
        self._hold_s = hold_s
        self._holding = Holding(placing.fleet)
        self._refused: list[tuple[int, Refusal]] = []
        turn = self._holding.turn if hold_s is not None else None
        self.admission = Admission(settings, placing.fleet, turn, draw)

    def __len__(self) -> int:
        return len(self.admission)

    @property
    def work_s(self) -> float:
        """Replica-seconds of work that waits."""
        return self.admission.work_s

    def arrive(self, booking: Booking, now: float) -> Placement:
        """Place it, let it wait or refuse it. One that a replica had begun is neither held nor refused."""
        if booking.resumes:
            return self.place(booking, now)
        admission, fleet = self.admission, self._placing.fleet
        admission.arrived(booking, now)
        willing = self._placing.willing(booking, now)
        if not willing and len(admission.in_serve) < MAX_IN_SERVE:
            admission.in_serve.add(booking.key)
            return Placement(None, 0)
        if willing:
            waiting = len(admission)
            fleet.num_held = min(waiting, _MAX_CROWD)
            if not (waiting and admission.must_wait(booking)) and self._send(booking, willing, now):
                return Placement(booking.replica_id, 0)
            if booking.slot < 0:
                # Choose for it, but place it nowhere.
                placed = self._placing.place(booking, willing, now, -1.0)
                assert not placed, "no wait is that short"
        admission.measure(booking)
        refusal = admission.refusal(booking, now, willing.bit_count())
        if refusal is not None:
            return Placement(None, 0, refusal=refusal)
        self._refused += [(victim.key, why) for victim, why in admission.enter(booking, now)]
        return Placement(None, 0, True)

    def place(self, booking: Booking, now: float) -> Placement:
        """Place it if any replica may take it, however long it waits there."""
        willing = self._placing.willing(booking, now)
        if not willing:
            return Placement(None, booking.num_moves)
        self._placing.place(booking, willing, now)
        self._placed(booking, now)
        return Placement(booking.replica_id, booking.num_moves)

    def dispatch(self, now: float) -> list[int]:
        """Place those whose turn has come and that a replica is free for; their keys."""
        admission, fleet = self.admission, self._placing.fleet
        sent: list[int] = []
        num_sent = -1
        while len(sent) > num_sent:
            num_sent = len(sent)
            num_replicas = self._placing.available(now).bit_count()
            self._refused += [(booking.key, why) for booking, why in admission.advance(now, num_replicas)]
            if not num_replicas:
                return [booking.key for booking in admission.next_for_serve()]
            fleet.num_held = min(len(admission), _MAX_CROWD)
            try:
                # Of those that wait on, the next in turn must see that they go first.
                sent += [
                    booking.key
                    for booking in admission.in_turn(now)
                    if self._send(booking, self._placing.willing(booking, now), now, reserves=True)
                ]
            finally:
                self._placing.unreserve()
        return sent

    def next_dispatch_s(self, now: float) -> float | None:
        """Seconds until a replica comes free, or one may that was not foreseen."""
        if self._refused:
            return 0.0
        if not len(self.admission):
            return None
        longest_s = self.admission.replica_queue.seconds if self._hold_s is None else self._hold_s
        free_at = self._placing.fleet.order.first_after(now + longest_s)
        # A seat or a block that comes free is not foreseen, nor a replica, nor how much one may have queued.
        delay_s = _LONGEST_POLL_S if free_at is None else free_at - longest_s - now
        return min(max(delay_s, 0.0), _LONGEST_POLL_S)

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """Those that have waited and are refused since the last call."""
        refused, self._refused = self._refused, []
        return refused

    def computed(self, booking: Booking, now: float) -> None:
        """A prompt has been computed: what that took is measured."""
        self.admission.computed(booking, now)

    def remove(self, booking: Booking) -> None:
        """It waits no more."""
        self.admission.remove(booking)

    def _send(self, booking: Booking, willing: int, now: float, *, reserves: bool = False) -> bool:
        """Place it if that is worth while now."""
        full = self._placing.fleet.full
        # The same bitmap again is known to the placer.
        free = willing & ~full if full else willing
        longest_s = self.admission.longest_wait_s(booking) if self._hold_s is None else self._hold_s
        if not free or not self._placing.place(booking, free, now, longest_s, reserves=reserves):
            return False
        self._placed(booking, now)
        return True

    def _placed(self, booking: Booking, now: float) -> None:
        if self._hold_s is not None:
            self._holding.placed(now - booking.arrived_at + booking.predicted_wait_s + booking.prefill_s)
        self.admission.measure(booking)
        self.admission.sent(booking, now)
