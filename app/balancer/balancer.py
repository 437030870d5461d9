"""The request-aware balancer of one model in one ingress: knows the replicas, books requests on them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from app.balancer.cost import ReplicaLoad, RequestCost, share_rates
from app.balancer.policy import Policy, default_policy
from app.transport.messages import LoadReport

logger = logging.getLogger(__name__)


class BookingGoneError(KeyError):
    """The booking was released or has expired: its request has ended or moved on."""


class Placement(NamedTuple):
    """Where a booking stands. `replica_id` is None while no replica can take it."""

    replica_id: str | None
    num_moves: int


@dataclass(slots=True)
class _Booking:
    """A request's claim on a replica. `reported`: the replica's own numbers include it by now."""

    cost: RequestCost
    excluded: frozenset[str]
    booked_at: float
    replica_id: str | None = None
    reported: bool = False
    num_moves: int = 0
    refused_by: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Replica:
    """What is known of one replica; sums over its unreported bookings are kept, not recomputed a decision."""

    block_size: int
    load: LoadReport
    heard_at: float
    draining: bool = False
    num_bookings: int = 0
    unreported_tokens: int = 0
    unreported_blocks: int = 0
    unreported_sequences: int = 0


class Balancer:
    """Thread-safe: every public method takes the one lock and holds it for microseconds.

    A booking is made at the moment of choice, so that two requests in the same millisecond see each other, and counts
    until the replica's report says that it includes the request. A booking that no replica can take stays unplaced;
    `place` tries again.

    Args:
        stale_after_s: a replica not heard from for longer is not chosen.
        expire_after_s: a booking that its replica has never confirmed is dropped after this.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        stale_after_s: float = 6.0,
        expire_after_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy or default_policy()
        self._stale_after_s = stale_after_s
        self._expire_after_s = expire_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._replicas: dict[str, _Replica] = {}
        self._bookings: dict[int, _Booking] = {}

    # Replicas

    def add_replica(self, replica_id: str, block_size: int, load: LoadReport) -> None:
        """A replica is connected and has sent its first report."""
        with self._lock:
            self._replicas[replica_id] = _Replica(block_size, load, self._clock())

    def remove_replica(self, replica_id: str) -> list[int]:
        """A replica is gone. Returns the bookings that were placed there; they are unplaced now."""
        with self._lock:
            self._replicas.pop(replica_id, None)
            keys = [key for key, booking in self._bookings.items() if booking.replica_id == replica_id]
            for key in keys:
                self._bookings[key].replica_id = None
            return keys

    def set_draining(self, replica_id: str) -> None:
        """Choose this replica no more. Bookings that it holds stay."""
        with self._lock:
            if replica_id in self._replicas:
                self._replicas[replica_id].draining = True

    def bookings_at(self, replica_id: str) -> list[int]:
        """The bookings placed on a replica."""
        with self._lock:
            return [key for key, booking in self._bookings.items() if booking.replica_id == replica_id]

    def report(self, replica_id: str, load: LoadReport) -> None:
        """A replica's new load. Bookings that it lists as admitted are in its numbers and count no longer here."""
        with self._lock:
            replica = self._replicas.get(replica_id)
            if replica is None:
                return
            replica.load = load
            replica.heard_at = self._clock()
            for key in load.admitted:
                booking = self._bookings.get(key)
                if booking is not None and booking.replica_id == replica_id and not booking.reported:
                    self._count(replica, booking, -1)
                    booking.reported = True

    def heard(self, replica_id: str) -> None:
        """A replica lives, whatever it said."""
        with self._lock:
            replica = self._replicas.get(replica_id)
            if replica is not None:
                replica.heard_at = self._clock()

    def has_alternative(self, replica_id: str) -> bool:
        """Whether another replica than this one could be chosen."""
        with self._lock:
            return any(other != replica_id for other in self._available())

    @property
    def num_available(self) -> int:
        """Replicas that a request could be placed on."""
        with self._lock:
            return len(self._available())

    @property
    def num_bookings(self) -> int:
        """Requests booked, those not placed yet included."""
        with self._lock:
            return len(self._bookings)

    # Requests

    def book(self, key: int, cost: RequestCost, excluded: Collection[str] = ()) -> Placement:
        """Book a request, at once on the best replica outside `excluded` if there is one."""
        with self._lock:
            assert key not in self._bookings, f"attempt {key} is booked twice"
            booking = _Booking(cost, frozenset(excluded), self._clock())
            self._bookings[key] = booking
            return self._place(booking)

    def place(self, key: int, *, refused: bool = False) -> Placement:
        """Where a booking belongs now.

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
                replica = self._replicas[booking.replica_id]
                if not replica.draining:
                    return Placement(booking.replica_id, booking.num_moves)
                self._unplace(booking)
            return self._place(booking)

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

    def _available(self) -> list[str]:
        freshest_allowed = self._clock() - self._stale_after_s
        return [
            replica_id
            for replica_id, replica in self._replicas.items()
            if not replica.draining and replica.heard_at >= freshest_allowed
        ]

    def _place(self, booking: _Booking) -> Placement:
        allowed = [replica_id for replica_id in self._available() if replica_id not in booking.excluded]
        willing = [replica_id for replica_id in allowed if replica_id not in booking.refused_by]
        if not willing:
            booking.refused_by.clear()
            willing = allowed
        if willing:
            chosen = self._choose(booking.cost, share_rates([self._load_of(replica_id) for replica_id in willing]))
            booking.replica_id = willing[chosen]
            booking.reported = False
            booking.booked_at = self._clock()
            replica = self._replicas[booking.replica_id]
            replica.num_bookings += 1
            self._count(replica, booking, 1)
        return Placement(booking.replica_id, booking.num_moves)

    def _choose(self, cost: RequestCost, loads: list[ReplicaLoad]) -> int:
        try:
            chosen = self._policy.choose(cost, loads)
            loads[chosen]  # an index out of range is the policy's error too
            return chosen
        except Exception:
            # A fault in a policy costs balance, never a request.
            logger.exception("balancing policy %s failed; taking the emptiest replica", type(self._policy).__name__)
            return min(range(len(loads)), key=lambda index: loads[index].num_bookings)

    def _unplace(self, booking: _Booking) -> None:
        replica = self._replicas.get(booking.replica_id) if booking.replica_id is not None else None
        booking.replica_id = None
        if replica is not None:
            replica.num_bookings -= 1
            if not booking.reported:
                self._count(replica, booking, -1)

    @staticmethod
    def _count(replica: _Replica, booking: _Booking, sign: int) -> None:
        cost = booking.cost
        replica.unreported_tokens += sign * cost.prompt_tokens
        replica.unreported_blocks += sign * -(-cost.prompt_tokens // replica.block_size)
        replica.unreported_sequences += sign * cost.num_sequences

    def _load_of(self, replica_id: str) -> ReplicaLoad:
        replica = self._replicas[replica_id]
        load = replica.load
        return ReplicaLoad(
            replica_id=replica_id,
            waiting_tokens=load.num_waiting_tokens + replica.unreported_tokens,
            num_sequences=load.num_waiting + load.num_running + replica.unreported_sequences,
            free_blocks=load.num_free_blocks - replica.unreported_blocks,
            block_size=replica.block_size,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            decode_step_s=load.decode_step_s,
            decode_sequence_s=load.decode_sequence_s,
            num_bookings=replica.num_bookings,
        )
