"""The request-aware balancer of one model in one ingress: knows the replicas, books requests on them."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable

from app.balancer import native
from app.balancer.admission import MAX_IN_SERVE, Admission, AdmissionSettings, AdmissionState
from app.balancer.availability import Availability
from app.balancer.booking import Booking, BookingGoneError, Placement, RouteReceipt
from app.balancer.cost import RequestCost
from app.balancer.fleet import SILENT_AFTER_S, Fleet
from app.balancer.holding import Holding
from app.balancer.ledger import Ledger
from app.balancer.placer import Placer
from app.balancer.policy import CheapestPolicy, Policy
from app.balancer.reservations import News
from app.balancer.terms import Refusal, RequestTerms
from app.transport.messages import LoadReport

# What waits makes cached prefixes worth more, up to so many requests.
_MAX_CROWD = 64
_LONGEST_POLL_S = 0.02


class Balancer:
    """Thread-safe: every public method takes the one lock and holds it for microseconds.

    A booking is made at the moment of choice, so that two requests in the same millisecond see each other, and counts
    until the replica's report says that it includes the request. A booking that no replica can take stays unplaced;
    `place` tries again.

    Args:
        hold_s: a request that would wait longer than this for prompts queued on the best replica is held back, and
            chosen for again when a replica comes free: shorter prompts then go first, and a replica with a longer
            match may be free. None lets admission say so, or places every request at once; without admission a large
            fleet holds nobody (holding.py).
        admission: lets requests wait here in turn, within bounds, and refuses those that would be served too late;
            without it none is refused.
        silent_after_s: choosing a replica not heard from for longer costs as long again.
        stale_after_s: a replica not heard from for longer is not chosen, unless that goes for all.
        expire_after_s: a booking that its replica has never confirmed is dropped after this.
        use_native: compute CheapestPolicy by the C++ core if it is there.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        hold_s: float | None = None,
        admission: AdmissionSettings | None = None,
        silent_after_s: float = SILENT_AFTER_S,
        stale_after_s: float = 6.0,
        expire_after_s: float = 120.0,
        use_native: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        policy = policy or CheapestPolicy()
        self._fleet: Fleet
        self._placer: Placer
        if use_native and type(policy) is CheapestPolicy and native.is_available():
            self._fleet = fleet = native.NativeFleet()
            self._placer = native.NativePlacer(policy, fleet)
        else:
            self._fleet = Fleet()
            self._placer = Placer(policy, self._fleet)
        self._fleet.silent_after_s = silent_after_s
        self._hold_s = hold_s
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._availability = Availability(self._fleet, stale_after_s)
        self._ledger = Ledger(self._fleet)
        self._holding = Holding(self._fleet)
        self._bookings: dict[int, Booking] = {}
        self._admission: Admission | None = None
        self._refused: list[tuple[int, Refusal]] = []
        if admission is not None:
            turn = self._holding.turn if hold_s is not None else None
            self._admission = Admission(admission, self._fleet, turn)

    # Replicas

    def add_replica(self, replica_id: str, block_size: int, load: LoadReport, seats: int = 0) -> None:
        """A replica is connected and has sent its first report. It runs up to `seats` sequences at once; 0 if that is
        not known."""
        with self._lock:
            now = self._clock()
            if self._fleet.slot_of(replica_id) is not None:
                self._forget_replica(replica_id)
            slot = self._fleet.add(replica_id, block_size, load, now, seats)
            self._ledger.open(replica_id)
            self._availability.heard(slot, now)
            self._ledger.recount(slot, replica_id, now)

    def remove_replica(self, replica_id: str) -> list[int]:
        """A replica is gone. Returns the bookings that were placed there; they are unplaced now."""
        with self._lock:
            return self._forget_replica(replica_id)

    def set_draining(self, replica_id: str) -> None:
        """Choose this replica no more. Bookings that it holds stay."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is not None:
                self._availability.drain(slot)

    def bookings_at(self, replica_id: str) -> list[int]:
        """The bookings placed on a replica."""
        with self._lock:
            return self._ledger.keys_at(replica_id)

    def report(self, replica_id: str, load: LoadReport, age_s: float = 0.0) -> None:
        """A replica's load as it was `age_s` ago. Bookings that it lists as admitted count no longer here."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is None:
                return
            now = self._clock()
            self._availability.heard(slot, now)
            self._ledger.admit(replica_id, load.admitted)
            self._fleet.report(slot, load)
            self._ledger.recount(slot, replica_id, now - age_s)

    def heard(self, replica_id: str) -> None:
        """A replica lives, whatever it said."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is not None:
                self._availability.heard(slot, self._clock())

    def blocks_changed(self, replica_id: str, stored: Iterable[Hashable], removed: Iterable[Hashable]) -> None:
        """What a replica has cached since, and what it has dropped."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is not None:
                self._fleet.index.store(slot, stored)
                self._fleet.index.remove(slot, removed)

    def blocks_replaced(self, replica_id: str, hashes: Iterable[Hashable]) -> None:
        """All that a replica has cached."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is not None:
                self._fleet.index.replace(slot, hashes)

    def has_alternative(self, replica_id: str) -> bool:
        """Whether another replica than this one could be chosen."""
        with self._lock:
            return bool(self._available() & ~self._bits((replica_id,)))

    @property
    def num_available(self) -> int:
        """Replicas that a request could be placed on."""
        with self._lock:
            return self._available().bit_count()

    @property
    def num_bookings(self) -> int:
        """Requests booked, those not placed yet included."""
        with self._lock:
            return len(self._bookings)

    @property
    def num_held(self) -> int:
        """Requests held back for a replica to come free, or to come up."""
        with self._lock:
            return len(self._holding) if self._admission is None else len(self._admission)

    # Admission

    @property
    def admission(self) -> AdmissionSettings | None:
        """How requests are admitted, if there is admission."""
        with self._lock:
            return None if self._admission is None else self._admission.settings

    def set_admission(self, settings: AdmissionSettings) -> None:
        """Go by other settings from now on; ValueError if there were none."""
        with self._lock:
            if self._admission is None:
                raise ValueError("a balancer without admission is made without it")
            self._admission.reconfigure(settings)

    @property
    def queued_s(self) -> float:
        """Replica-seconds of work that requests held back here will take."""
        with self._lock:
            return self._holding.prefill_s if self._admission is None else self._admission.work_s

    def take_promises(self) -> News:
        """What other ingresses of this model should know of refused requests, since the last call."""
        with self._lock:
            return News([], []) if self._admission is None else self._admission.reservations.take_news(self._clock())

    def hear_promises(self, news: News) -> None:
        """What another ingress has told refused requests of this model."""
        with self._lock:
            if self._admission is not None:
                self._admission.reservations.hear(news, self._clock())

    def admission_state(self) -> AdmissionState:
        """For metrics."""
        with self._lock:
            return AdmissionState() if self._admission is None else self._admission.state()

    # Requests

    def book(
        self,
        key: int,
        cost: RequestCost,
        excluded: Collection[str] = (),
        terms: RequestTerms | None = None,
        *,
        resumes: bool = False,
    ) -> Placement:
        """Book a request, at once on the best replica outside `excluded` if there is one.

        Args:
            terms: what admission goes by.
            resumes: a replica had begun it, and it goes on elsewhere: it is neither refused nor held.
        """
        with self._lock:
            assert key not in self._bookings, f"attempt {key} is booked twice"
            now = self._clock()
            booking = Booking(key, cost, frozenset(excluded), now, now, terms=terms or RequestTerms(), resumes=resumes)
            self._bookings[key] = booking
            if self._admission is None or resumes:
                return self._place(booking, now, may_hold=self._admission is None)
            return self._admit(self._admission, booking, now)

    def place(self, key: int, *, refused: bool = False) -> Placement:
        """Where a booking belongs now. Whoever asks is about to send the request: it is held no longer.

        Args:
            refused: the replica it was placed on did not take it. Another is chosen; it comes into question again once
                all others have refused too.

        Raises:
            BookingGoneError: the booking was released.
        """
        with self._lock:
            booking = self._bookings.get(key)
            if booking is None:
                raise BookingGoneError(key)
            if refused and booking.replica_id is not None:
                booking.refused_by |= {booking.replica_id}
                self._ledger.take(booking)
                booking.num_moves += 1
            if booking.replica_id is not None:
                if not self._availability.is_draining(booking.slot):
                    return Placement(booking.replica_id, booking.num_moves)
                self._ledger.take(booking)
            return self._place(booking, self._clock(), may_hold=False)

    def dispatch(self) -> list[int]:
        """Place held requests that a replica has become free for; their keys."""
        with self._lock:
            now = self._clock()
            if self._admission is not None:
                return self._dispatch_admitted(self._admission, now)
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
                self._placer.unreserve()

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """Bookings that waited and are refused since the last call: their keys, to be released, and why."""
        with self._lock:
            refused, self._refused = self._refused, []
            return refused

    def next_dispatch_s(self) -> float | None:
        """Seconds until `dispatch` may find something to do, as far as can be foreseen; None if nothing is held."""
        with self._lock:
            if self._admission is not None:
                return self._next_admitted_s(self._admission, self._clock())
            if not len(self._holding) or self._hold_s is None:
                return None
            now = self._clock()
            next_at = min(self._holding.next_at(now + self._hold_s) - self._hold_s, self._holding.overdue_at())
            return max(next_at - now, 0.0)

    def computed(self, key: int) -> None:
        """A request's prompt has been computed: its blocks are published by now, and it waits no more."""
        with self._lock:
            booking = self._bookings.get(key)
            if booking is not None:
                self._ledger.computed(booking)
                if self._admission is not None:
                    self._admission.computed(booking, self._clock())

    def receipt(self, key: int) -> RouteReceipt | None:
        """What a placed booking's choice rested on."""
        with self._lock:
            booking = self._bookings.get(key)
            return booking.receipt() if booking is not None else None

    def replica_of(self, key: int) -> str | None:
        """The replica a booking is placed on, if any."""
        with self._lock:
            booking = self._bookings.get(key)
            return booking.replica_id if booking is not None else None

    def release(self, key: int) -> None:
        """A request has ended or given this attempt up. Unknown keys are no error."""
        with self._lock:
            booking = self._bookings.pop(key, None)
            if booking is not None:
                self._holding.remove(booking)
                self._ledger.take(booking)
                if self._admission is not None:
                    self._admission.remove(booking)

    def expire(self) -> list[int]:
        """Drop placed bookings that their replicas have not confirmed for too long, and return them."""
        with self._lock:
            oldest = self._clock() - self._expire_after_s
            keys = [
                key
                for key, booking in self._bookings.items()
                if booking.replica_id is not None and not booking.reported and booking.booked_at < oldest
            ]
            for key in keys:
                self._ledger.take(self._bookings.pop(key))
            return keys

    # Under the lock

    def _bits(self, replica_ids: Iterable[str]) -> int:
        slots = (self._fleet.slot_of(replica_id) for replica_id in replica_ids)
        return sum(1 << slot for slot in slots if slot is not None)

    def _available(self) -> int:
        return self._availability.bitmap(self._clock())

    def _willing(self, booking: Booking, now: float) -> int:
        """Replicas that may be chosen for it, a bitmap. None are excluded because they have refused if all have."""
        allowed = self._availability.bitmap(now)
        if booking.excluded:
            allowed &= ~self._bits(booking.excluded)
        willing = allowed
        if booking.refused_by:
            willing &= ~self._bits(booking.refused_by)
        if not willing:
            booking.refused_by = frozenset()
            willing = allowed
        return willing

    def _place(self, booking: Booking, now: float, *, may_hold: bool, reserves: bool = False) -> Placement:
        self._fleet.now = now
        willing = self._willing(booking, now)
        if not willing:
            self._holding.remove(booking)
            return Placement(None, booking.num_moves)
        hold_s = math.inf
        if may_hold and self._hold_s is not None and self._holding.has_room_for(booking, now):
            hold_s = self._hold_s
        if not self._placer.place(booking, willing, hold_s, reserves=reserves):
            self._holding.add(booking, booking.slot)
            return Placement(None, booking.num_moves, True)
        self._holding.remove(booking)
        return self._placed(booking, now)

    def _placed(self, booking: Booking, now: float) -> Placement:
        self._holding.placed(now - booking.arrived_at + booking.predicted_wait_s + booking.prefill_s)
        self._ledger.put(booking, now)
        if self._admission is not None:
            self._admission.measure(booking)
            self._admission.sent(booking, now)
        assert booking.replica_id is not None
        return Placement(booking.replica_id, booking.num_moves)

    # Under the lock, with admission

    def _admit(self, admission: Admission, booking: Booking, now: float) -> Placement:
        """Place it, let it wait or refuse it."""
        admission.arrived(booking, now)
        willing = self._willing(booking, now)
        if not willing and len(admission.in_serve) < MAX_IN_SERVE:
            admission.in_serve.add(booking.key)
            return Placement(None, 0)
        if willing:
            self._fleet.num_held = min(len(admission), _MAX_CROWD)
            if not admission.must_wait(booking) and self._send(booking, willing, now):
                return Placement(booking.replica_id, 0)
            if booking.slot < 0:
                self._quote(booking, willing, now)
        admission.measure(booking)
        refusal = admission.refusal(booking, now, willing.bit_count())
        if refusal is not None:
            del self._bookings[booking.key]
            return Placement(None, 0, refusal=refusal)
        self._refused += [(victim.key, why) for victim, why in admission.enter(booking, now)]
        return Placement(None, 0, True)

    def _send(self, booking: Booking, willing: int, now: float, *, reserves: bool = False) -> bool:
        """Place it if that is worth while now."""
        free = willing & ~self._fleet.full
        if not free:
            return False
        self._fleet.now = now
        if not self._placer.place(booking, free, self._longest_wait_s, reserves=reserves):
            return False
        self._placed(booking, now)
        return True

    def _quote(self, booking: Booking, willing: int, now: float) -> None:
        """Choose for it, but place it nowhere."""
        self._fleet.now = now
        placed = self._placer.place(booking, willing, -1.0)
        assert not placed, "no wait is that short"

    @property
    def _longest_wait_s(self) -> float:
        assert self._admission is not None
        return self._admission.replica_queue_s if self._hold_s is None else self._hold_s

    def _dispatch_admitted(self, admission: Admission, now: float) -> list[int]:
        sent: list[int] = []
        num_sent = -1
        while len(sent) > num_sent:
            num_sent = len(sent)
            num_replicas = self._availability.bitmap(now).bit_count()
            self._refused += [(booking.key, why) for booking, why in admission.advance(now, num_replicas)]
            if not num_replicas:
                return [booking.key for booking in admission.next_for_serve()]
            self._fleet.num_held = min(len(admission), _MAX_CROWD)
            try:
                # Of those that wait on, the next in turn must see that they go first.
                sent += [
                    booking.key
                    for booking in admission.in_turn(now)
                    if self._send(booking, self._willing(booking, now), now, reserves=True)
                ]
            finally:
                self._placer.unreserve()
        return sent

    def _next_admitted_s(self, admission: Admission, now: float) -> float | None:
        if self._refused:
            return 0.0
        if not len(admission):
            return None
        free_at = self._fleet.order.first_after(now + self._longest_wait_s)
        # A seat or a block that comes free is not foreseen, nor a replica.
        delay_s = _LONGEST_POLL_S if free_at is None else free_at - self._longest_wait_s - now
        return min(max(delay_s, 0.0), _LONGEST_POLL_S)

    def _forget_replica(self, replica_id: str) -> list[int]:
        slot = self._fleet.slot_of(replica_id)
        if slot is None:
            return []
        self._availability.forget(slot)
        keys = self._ledger.close(replica_id)
        self._fleet.remove(replica_id)
        return keys
