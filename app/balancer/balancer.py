"""The request-aware balancer of one model in one ingress: knows the replicas, books requests on them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable

from app.balancer import native
from app.balancer.admission import Admission
from app.balancer.admission_counts import AdmissionState
from app.balancer.admission_settings import AdmissionSettings
from app.balancer.admitting import Admitting
from app.balancer.availability import Availability
from app.balancer.booking import Booking, BookingGoneError, Placement, RouteReceipt
from app.balancer.cost import RequestCost
from app.balancer.fleet import SILENT_AFTER_S, Fleet
from app.balancer.ledger import Ledger
from app.balancer.placer import Placer
from app.balancer.placing import Placing
from app.balancer.policy import CheapestPolicy, Policy
from app.balancer.reservations import News
from app.balancer.terms import DEFAULT_TERMS, Refusal, RequestTerms
from app.balancer.waiting import HoldingBack, Waiting
from app.transport.messages import LoadReport


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
        draw: where chance comes from, which keeps several ingresses from all doing the same.
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
        draw: random.Random | None = None,
    ) -> None:
        policy = policy or CheapestPolicy()
        self._fleet: Fleet
        placer: Placer
        if use_native and type(policy) is CheapestPolicy and native.is_available():
            self._fleet = fleet = native.NativeFleet()
            placer = native.NativePlacer(policy, fleet)
        else:
            self._fleet = Fleet()
            placer = Placer(policy, self._fleet)
        self._fleet.silent_after_s = silent_after_s
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._availability = Availability(self._fleet, stale_after_s)
        self._ledger = Ledger(self._fleet)
        self._placing = Placing(self._fleet, placer, self._availability, self._ledger)
        self._bookings: dict[int, Booking] = {}
        self._waiting: Waiting
        self._admission: Admission | None = None
        if admission is None:
            self._waiting = HoldingBack(self._placing, hold_s)
        else:
            self._waiting = admitting = Admitting(self._placing, admission, hold_s, draw)
            self._admission = admitting.admission

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
            return bool(self._placing.available(self._clock()) & ~self._placing.bits((replica_id,)))

    @property
    def num_available(self) -> int:
        """Replicas that a request could be placed on."""
        with self._lock:
            return self._placing.available(self._clock()).bit_count()

    @property
    def num_bookings(self) -> int:
        """Requests booked, those not placed yet included."""
        with self._lock:
            return len(self._bookings)

    @property
    def num_held(self) -> int:
        """Requests held back for a replica to come free, or to come up."""
        with self._lock:
            return len(self._waiting)

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
            return self._waiting.work_s

    def take_promises(self) -> News:
        """What other ingresses of this model should know of refused requests, since the last call."""
        with self._lock:
            return News([], []) if self._admission is None else self._admission.reservations.take_news(self._clock())

    def hear_promises(self, news: News) -> None:
        """What another ingress has told refused requests of this model."""
        with self._lock:
            if self._admission is not None:
                self._admission.hear(news, self._clock())

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
            booking = Booking(key, cost, frozenset(excluded), now, now, terms=terms or DEFAULT_TERMS, resumes=resumes)
            placement = self._waiting.arrive(booking, now)
            if placement.refusal is None:
                self._bookings[key] = booking
            return placement

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
            return self._waiting.place(booking, self._clock())

    def dispatch(self) -> list[int]:
        """Place held requests that a replica has become free for; their keys."""
        with self._lock:
            return self._waiting.dispatch(self._clock())

    def take_refused(self) -> list[tuple[int, Refusal]]:
        """Bookings that waited and are refused since the last call: their keys, to be released, and why."""
        with self._lock:
            return self._waiting.take_refused()

    def next_dispatch_s(self) -> float | None:
        """Seconds until `dispatch` may find something to do, as far as can be foreseen; None if nothing is held."""
        with self._lock:
            return self._waiting.next_dispatch_s(self._clock())

    def computed(self, key: int) -> None:
        """A request's prompt has been computed: its blocks are published by now, and it waits no more."""
        with self._lock:
            booking = self._bookings.get(key)
            if booking is not None:
                self._ledger.computed(booking)
                self._waiting.computed(booking, self._clock())

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
                self._waiting.remove(booking)
                self._ledger.take(booking)

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

    def _forget_replica(self, replica_id: str) -> list[int]:
        slot = self._fleet.slot_of(replica_id)
        if slot is None:
            return []
        self._availability.forget(slot)
        keys = self._ledger.close(replica_id)
        self._fleet.remove(replica_id)
        return keys
