"""The request-aware balancer of one model in one ingress: knows the replicas, books requests on them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable

from app.balancer.booking import Booking, BookingGoneError, Placement, RouteReceipt
from app.balancer.cost import RequestCost
from app.balancer.fleet import Fleet
from app.balancer.policy import CheapestPolicy, Choice, Policy
from app.transport.messages import LoadReport

logger = logging.getLogger(__name__)

# Held requests looked at in one go, the first in their order.
_MAX_HELD_TRIED = 64
# Seconds of prompt by which a held request counts as shorter for each second that it has waited.
_AGEING = 0.3
# Prompts longer than this count as this long among those held, or the longest would wait for all others.
_LONGEST_S = 3.0


class Balancer:
    """Thread-safe: every public method takes the one lock and holds it for microseconds.

    A booking is made at the moment of choice, so that two requests in the same millisecond see each other, and counts
    until the replica's report says that it includes the request. A booking that no replica can take stays unplaced;
    `place` tries again.

    Args:
        hold_s: a request that would wait longer than this for prompts queued on the best replica is held back, and
            chosen for again when a replica comes free: shorter prompts then go first, and a replica with a longer
            match may be free. None places every request at once.
        stale_after_s: a replica not heard from for longer is not chosen.
        expire_after_s: a booking that its replica has never confirmed is dropped after this.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        hold_s: float | None = None,
        stale_after_s: float = 6.0,
        expire_after_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy or CheapestPolicy()
        self._hold_s = hold_s
        self._stale_after_s = stale_after_s
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._fleet = Fleet()
        self._heard_at: dict[str, float] = {}
        self._draining: set[str] = set()
        self._bookings: dict[int, Booking] = {}
        self._placed: dict[str, dict[int, Booking]] = {}
        self._unreported: dict[str, dict[int, Booking]] = {}
        self._held: dict[int, Booking] = {}
        self._available_bits = 0
        self._available_until = -math.inf

    # Replicas

    def add_replica(self, replica_id: str, block_size: int, load: LoadReport) -> None:
        """A replica is connected and has sent its first report."""
        with self._lock:
            now = self._clock()
            if self._fleet.slot_of(replica_id) is not None:
                self._forget_replica(replica_id)
            slot = self._fleet.add(replica_id, block_size, load, now)
            self._placed[replica_id], self._unreported[replica_id] = {}, {}
            self._hear(replica_id, slot, now)
            self._recount(slot, replica_id, now)

    def remove_replica(self, replica_id: str) -> list[int]:
        """A replica is gone. Returns the bookings that were placed there; they are unplaced now."""
        with self._lock:
            return self._forget_replica(replica_id)

    def set_draining(self, replica_id: str) -> None:
        """Choose this replica no more. Bookings that it holds stay."""
        with self._lock:
            if self._fleet.slot_of(replica_id) is not None:
                self._draining.add(replica_id)
                self._available_bits &= ~self._bit(replica_id)

    def bookings_at(self, replica_id: str) -> list[int]:
        """The bookings placed on a replica."""
        with self._lock:
            return list(self._placed.get(replica_id, ()))

    def report(self, replica_id: str, load: LoadReport, age_s: float = 0.0) -> None:
        """A replica's load as it was `age_s` ago. Bookings that it lists as admitted count no longer here."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is None:
                return
            now = self._clock()
            self._hear(replica_id, slot, now)
            unreported = self._unreported[replica_id]
            for key in load.admitted:
                booking = unreported.pop(key, None)
                if booking is not None:
                    booking.reported = True
            self._fleet.loads[slot] = load
            self._recount(slot, replica_id, now - age_s)

    def heard(self, replica_id: str) -> None:
        """A replica lives, whatever it said."""
        with self._lock:
            slot = self._fleet.slot_of(replica_id)
            if slot is not None:
                self._hear(replica_id, slot, self._clock())

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
            return bool(self._available() & ~self._bit(replica_id))

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
        """Requests held back for a replica to come free."""
        with self._lock:
            return len(self._held)

    # Requests

    def book(self, key: int, cost: RequestCost, excluded: Collection[str] = ()) -> Placement:
        """Book a request, at once on the best replica outside `excluded` if there is one."""
        with self._lock:
            assert key not in self._bookings, f"attempt {key} is booked twice"
            now = self._clock()
            booking = Booking(key, cost, frozenset(excluded), now, now)
            self._bookings[key] = booking
            return self._place(booking, may_hold=True)

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
                booking.refused_by.add(booking.replica_id)
                self._unplace(booking)
                booking.num_moves += 1
            if booking.replica_id is not None:
                if booking.replica_id not in self._draining:
                    return Placement(booking.replica_id, booking.num_moves)
                self._unplace(booking)
            return self._place(booking, may_hold=False)

    def dispatch(self) -> list[int]:
        """Place held requests that a replica has become free for; their keys."""
        with self._lock:
            now = self._clock()
            waiting = sorted(self._held.values(), key=lambda booking: _turn(booking, now))
            reserved = []
            placed = []
            for booking in waiting[:_MAX_HELD_TRIED]:
                if self._place(booking, may_hold=True).held:
                    # The next in turn must see that this one goes there first.
                    reserved.append((booking.wanted_slot, self._fleet.free_at[booking.wanted_slot]))
                    self._queue_prompt(booking.wanted_slot, booking.prefill_s, now)
                else:
                    placed.append(booking.key)
            for slot, free_at in reversed(reserved):
                self._fleet.set_free_at(slot, free_at)
            return placed

    def next_dispatch_s(self) -> float | None:
        """Seconds until `dispatch` may find something to do, as far as can be foreseen; None if nothing is held."""
        with self._lock:
            if not self._held or self._hold_s is None:
                return None
            now = self._clock()
            free_at = self._fleet.order.first_after(now + self._hold_s)
            return max(free_at - self._hold_s - now, 0.0) if free_at is not None else 0.0

    def computed(self, key: int) -> None:
        """A request's prompt has been computed: its blocks are published by now, and it waits no more."""
        with self._lock:
            booking = self._bookings.get(key)
            if booking is not None and booking.replica_id is not None:
                self._fleet.stop_expecting(booking.slot, booking.expected)
                booking.expected = ()

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
                self._held.pop(key, None)
                self._unplace(booking)

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
                self._unplace(self._bookings.pop(key))
            return keys

    # Under the lock

    def _bit(self, replica_id: str) -> int:
        slot = self._fleet.slot_of(replica_id)
        return 1 << slot if slot is not None else 0

    def _available(self) -> int:
        """Replicas to choose from, as a bitmap; looked through again only when one may have fallen silent."""
        now = self._clock()
        if now > self._available_until:
            self._available_bits = 0
            oldest = now
            for replica_id, heard_at in self._heard_at.items():
                if heard_at >= now - self._stale_after_s and replica_id not in self._draining:
                    self._available_bits |= self._bit(replica_id)
                    oldest = min(oldest, heard_at)
            self._available_until = oldest + self._stale_after_s
        return self._available_bits

    def _hear(self, replica_id: str, slot: int, now: float) -> None:
        self._heard_at[replica_id] = now
        if replica_id not in self._draining:
            self._available_bits |= self._fleet.index.bit(slot)

    def _place(self, booking: Booking, *, may_hold: bool) -> Placement:
        allowed = self._available()
        for replica_id in booking.excluded:
            allowed &= ~self._bit(replica_id)
        willing = allowed
        for replica_id in booking.refused_by:
            willing &= ~self._bit(replica_id)
        if not willing:
            booking.refused_by.clear()
            willing = allowed
        if not willing:
            return Placement(None, booking.num_moves, self._hold(booking, False))
        now = self._fleet.now = self._clock()
        choice = self._choose(booking.cost, willing)
        wait_s = max(self._fleet.free_at[choice.slot] - now, 0.0)
        booking.num_cached_blocks = choice.num_cached_blocks
        booking.predicted_cost_s = choice.cost_s
        booking.predicted_wait_s = wait_s
        booking.prefill_s = booking.uncached_tokens / self._fleet.rates(choice.slot)[0]
        booking.wanted_slot = choice.slot
        if self._hold(booking, may_hold and self._hold_s is not None and wait_s > self._hold_s):
            return Placement(None, booking.num_moves, True)
        self._put(booking, choice.slot, now)
        return Placement(booking.replica_id, booking.num_moves)

    def _hold(self, booking: Booking, hold: bool) -> bool:
        if hold:
            self._held[booking.key] = booking
        elif booking.held:
            self._held.pop(booking.key, None)
        booking.held = hold
        return hold

    def _put(self, booking: Booking, slot: int, now: float) -> None:
        fleet = self._fleet
        booking.slot = slot
        booking.replica_id = fleet.replica_ids[slot]
        booking.reported = False
        booking.booked_at = now
        booking.expected = booking.cost.block_hashes[booking.num_cached_blocks :]
        fleet.expect(slot, booking.expected)
        self._placed[booking.replica_id][booking.key] = booking
        self._unreported[booking.replica_id][booking.key] = booking
        fleet.num_sequences[slot] += booking.cost.num_sequences
        fleet.num_blocks_taken[slot] += booking.num_new_blocks
        self._queue_prompt(slot, booking.prefill_s, now)
        self._policy.placed(booking.prefill_s)

    def _queue_prompt(self, slot: int, prefill_s: float, now: float) -> None:
        self._fleet.set_free_at(slot, max(self._fleet.free_at[slot], now) + prefill_s)

    def _choose(self, cost: RequestCost, among: int) -> Choice:
        try:
            choice = self._policy.choose(cost, self._fleet, among)
            if choice.slot >= 0 and among >> choice.slot & 1:
                return choice
            raise IndexError(f"it chose slot {choice.slot}, which is no candidate")
        except Exception:
            # A fault in a policy costs balance, never a request.
            logger.exception("balancing policy %s failed; taking the emptiest replica", type(self._policy).__name__)
            emptiest = next(slot for _, slot in self._fleet.order if among >> slot & 1)
            return Choice(emptiest, 0, 0.0)

    def _unplace(self, booking: Booking) -> None:
        replica_id, booking.replica_id = booking.replica_id, None
        slot = self._fleet.slot_of(replica_id) if replica_id is not None else None
        if replica_id is None or slot is None:
            return
        del self._placed[replica_id][booking.key]
        self._fleet.stop_expecting(slot, booking.expected)
        booking.expected = ()
        if not booking.reported:
            fleet = self._fleet
            del self._unreported[replica_id][booking.key]
            fleet.num_sequences[slot] -= booking.cost.num_sequences
            fleet.num_blocks_taken[slot] -= booking.num_new_blocks
            fleet.set_free_at(slot, fleet.free_at[slot] - booking.prefill_s)

    def _recount(self, slot: int, replica_id: str, reported_at: float) -> None:
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

    def _forget_replica(self, replica_id: str) -> list[int]:
        if self._fleet.slot_of(replica_id) is None:
            return []
        self._available_bits &= ~self._bit(replica_id)
        placed = self._placed.pop(replica_id)
        del self._unreported[replica_id]
        for booking in placed.values():
            booking.replica_id = None
            booking.expected = ()
        self._fleet.remove(replica_id)
        del self._heard_at[replica_id]
        self._draining.discard(replica_id)
        return list(placed)


def _turn(booking: Booking, now: float) -> float:
    """Held requests go by how long they keep a replica busy, and a long one's turn comes with time."""
    return min(booking.prefill_s, _LONGEST_S) - _AGEING * (now - booking.arrived_at)
