"""Who goes next of those who wait: classes by priority, tenants by deficit round robin, a tenant's own by deadline."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from app.balancer.booking import Booking

# Tokens that a tenant of weight 1 may send on before it is the next one's turn: some short prompts.
_QUANTUM = 512.0

_Key = tuple[float, int]


@dataclass(slots=True)
class _Tenant:
    """One tenant's waiting bookings in a class, the earliest deadline first, with their work in all."""

    weight: float
    deficit: float = 0.0
    work_s: float = 0.0
    keys: list[_Key] = field(default_factory=list)
    bookings: dict[_Key, Booking] = field(default_factory=dict)

    @property
    def first(self) -> Booking:
        return self.bookings[self.keys[0]]


class _Level:
    """The tenants of one priority, in turn (Shreedhar and Varghese, Efficient Fair Queuing Using Deficit Round Robin,
    1995), counting tokens.

    Who comes anew goes first once, as FQ-CoDel has it (RFC 8290): whoever sends little then waits for nobody's turn. It
    keeps its place among the turns until that is reached with nothing to send.
    """

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant] = {}
        self.work_s = 0.0
        self._turns: deque[str] = deque()
        # Of those among the turns who have nothing to send now.
        self._deficits: dict[str, float] = {}

    def add(self, booking: Booking, weight: float) -> None:
        name = booking.terms.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant(weight)
            if name in self._deficits:
                tenant.deficit = self._deficits.pop(name)
            else:
                tenant.deficit = _QUANTUM * weight
                self._turns.appendleft(name)
        key = (booking.deadline_at, booking.key)
        insort(tenant.keys, key)
        tenant.bookings[key] = booking
        tenant.work_s += booking.work_s
        self.work_s += booking.work_s

    def remove(self, booking: Booking) -> None:
        name = booking.terms.tenant
        tenant = self.tenants[name]
        key = (booking.deadline_at, booking.key)
        del tenant.bookings[key]
        del tenant.keys[bisect_left(tenant.keys, key)]
        tenant.work_s -= booking.work_s
        self.work_s -= booking.work_s
        if not tenant.keys:
            # Whoever has nothing to send saves up nothing.
            del self.tenants[name]
            self._deficits[name] = min(tenant.deficit, 0.0)

    def next(self) -> Booking:
        """The one whose turn it is, paid for by its tenant; the caller removes it."""
        turns = self._turns
        while True:
            for _ in range(len(turns)):
                tenant = self.tenants.get(turns[0])
                if tenant is None:
                    del self._deficits[turns.popleft()]
                    continue
                booking = tenant.first
                if tenant.deficit >= booking.num_tokens:
                    tenant.deficit -= booking.num_tokens
                    return booking
                tenant.deficit += _QUANTUM * tenant.weight
                turns.rotate(-1)
            # Rounds in which nobody could send would only be counted through.
            rounds = min(
                (tenant.first.num_tokens - tenant.deficit) / (_QUANTUM * tenant.weight)
                for tenant in self.tenants.values()
            )
            if rounds > 1:
                for tenant in self.tenants.values():
                    tenant.deficit += int(rounds) * _QUANTUM * tenant.weight

    def work_before(self, name: str, key: _Key, weight: float) -> float:
        """Work that goes before a tenant's booking of that key, in it or not: its own earlier ones', and of the others'
        what they are due meanwhile."""
        tenant = self.tenants.get(name)
        own_s = 0.0
        if tenant is not None:
            weight = tenant.weight
            own_s = sum(tenant.bookings[earlier].work_s for earlier in tenant.keys[: bisect_left(tenant.keys, key)])
        return own_s + self._others(name, own_s, weight)

    def _others(self, name: str, own_s: float, weight: float) -> float:
        """What the other tenants are served until this one has had so much, and its next turn."""
        total = 0.0
        for other, tenant in self.tenants.items():
            if other != name:
                total += min(tenant.work_s, own_s * tenant.weight / weight + tenant.first.work_s)
        return total

    def in_order(self) -> Iterator[tuple[Booking, float]]:
        """Each waiting booking, with the work of its level that goes before it."""
        for name, tenant in self.tenants.items():
            own_s = 0.0
            for key in tenant.keys:
                booking = tenant.bookings[key]
                yield booking, own_s + self._others(name, own_s, tenant.weight)
                own_s += booking.work_s


class FairQueue:
    """Not thread-safe: the balancer's lock guards it.

    Args:
        weights: of tenants that are to have more or less than others; 1 for all who are not named.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._levels: dict[int, _Level] = {}
        self._queued: dict[int, Booking] = {}
        self.num_tokens = 0.0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, booking: Booking) -> bool:
        return booking.key in self._queued

    def __iter__(self) -> Iterator[Booking]:
        return iter(self._queued.values())

    @property
    def work_s(self) -> float:
        """Work of all who wait."""
        return sum(level.work_s for level in self._levels.values())

    def add(self, booking: Booking) -> None:
        """Queue it by its terms and `deadline_at`, which stays as it is until it is removed."""
        self._queued[booking.key] = booking
        self.num_tokens += booking.num_tokens
        level = self._levels.setdefault(booking.terms.priority, _Level())
        level.add(booking, self._weights.get(booking.terms.tenant, 1.0))

    def remove(self, booking: Booking) -> None:
        """Take it out; it must be in."""
        del self._queued[booking.key]
        self.num_tokens -= booking.num_tokens
        priority = booking.terms.priority
        level = self._levels[priority]
        level.remove(booking)
        if not level.tenants:
            del self._levels[priority]

    def pop(self, priority: int | None = None) -> Booking | None:
        """Take out the next in turn, of that priority or of any; None if there is none."""
        if not self._levels or (priority is not None and priority not in self._levels):
            return None
        booking = self._levels[min(self._levels) if priority is None else priority].next()
        self.remove(booking)
        return booking

    @property
    def priorities(self) -> list[int]:
        """Those that somebody waits in, the first to go first."""
        return sorted(self._levels)

    def newest(self, above: int) -> Booking | None:
        """The newest of the last priority, if that comes after `above`: who is to go when somebody must. One that was
        told to come now stays."""
        for priority in sorted(self._levels, reverse=True):
            if priority <= above:
                return None
            waiting = [
                booking
                for tenant in self._levels[priority].tenants.values()
                for booking in tenant.bookings.values()
                if not booking.promised
            ]
            if waiting:
                return max(waiting, key=lambda booking: (booking.arrived_at, booking.key))
        return None

    def work_before(self, booking: Booking) -> float:
        """Work that will have gone before it, in replica-seconds, if nobody else comes; it may be queued or not."""
        priority, name = booking.terms.priority, booking.terms.tenant
        before_s = sum(level.work_s for other, level in self._levels.items() if other < priority)
        level = self._levels.get(priority)
        if level is not None:
            key = (booking.deadline_at, booking.key)
            before_s += level.work_before(name, key, self._weights.get(name, 1.0))
        return before_s

    def in_order(self) -> Iterator[tuple[Booking, float]]:
        """Each waiting booking with the work that goes before it, as `work_before` has it."""
        before_s = 0.0
        for priority in self.priorities:
            level = self._levels[priority]
            for booking, within_s in level.in_order():
                yield booking, before_s + within_s
            before_s += level.work_s
