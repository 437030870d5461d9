"""Who goes next of those who wait: classes by priority, tenants by fair queueing, a tenant's own by deadline.

Those of a tenant who were told to come now go before its others."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

from app.balancer.booking import Booking

# Of so many mean requests, at least, a tenant that has asked for nothing may be ahead of its share.
_LEAST_BURST = 2.0
# Weight of one more request in their mean.
_WEIGHT = 0.1
# Fewer tenants than this are not looked through for those who may be forgotten.
_FEW = 64

# Of one tenant's the least goes first: those who were told to come now, then by deadline.
_Key = tuple[bool, float, int]


@dataclass(slots=True)
class _Tenant:
    """One tenant's waiting bookings in a class, in their order, with their work in all; `tag` is the
    first one's."""

    weight: float
    tag: float
    work_s: float = 0.0
    keys: list[_Key] = field(default_factory=list)
    bookings: dict[_Key, Booking] = field(default_factory=dict)

    @property
    def first(self) -> Booking:
        return self.bookings[self.keys[0]]

    def earlier_s(self, key: _Key) -> float:
        """Work of its own that goes before that of this key, in it or not."""
        return sum(self.bookings[earlier].work_s for earlier in self.keys[: bisect_left(self.keys, key)])


class _Level:
    """The tenants of one priority (Goyal, Vin and Cheng, Start-time Fair Queueing, 1996).

    Virtual time is the tag of what was sent last. A booking's tag is where the one of its tenant before it ends, which
    is its work by its tenant's weight after that one's own tag; or just before now, if that is later. The least tag
    goes first: whoever asks for less than its share goes next, however much others have queued. In turns, as by
    deficit round robin, it would wait for a turn of each.

    Attributes:
        now: virtual time.
        credit: how far a tenant's tag may be behind it: what whoever has asked for less may ask for at once.
    """

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant] = {}
        self.work_s = 0.0
        self.now = 0.0
        # Of those with nothing queued, where their last ends, if that is yet to come or has just been.
        self._ends: dict[str, float] = {}
        self._many_ends = _FEW
        self._mean_work = 0.0
        self.credit = 0.0

    def add(self, booking: Booking, weight: float) -> None:
        name = booking.terms.tenant
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant(weight, self.tag_of(name))
            self._ends.pop(name, None)
        key = _key_of(booking)
        insort(tenant.keys, key)
        tenant.bookings[key] = booking
        tenant.work_s += booking.work_s
        self.work_s += booking.work_s

    def remove(self, booking: Booking) -> None:
        name = booking.terms.tenant
        tenant = self.tenants[name]
        key = _key_of(booking)
        del tenant.bookings[key]
        del tenant.keys[bisect_left(tenant.keys, key)]
        tenant.work_s -= booking.work_s
        self.work_s -= booking.work_s
        if not tenant.keys:
            del self.tenants[name]
            self._ends[name] = tenant.tag
        if not self.tenants:
            self.work_s = 0.0

    def next_tag(self) -> float:
        """Of the one whose turn it is."""
        return min(tenant.tag for tenant in self.tenants.values())

    def pop(self) -> Booking:
        """Take out the one whose turn it is, charged to its tenant; its tag is in `turn`."""
        tenant = min(self.tenants.values(), key=lambda tenant: (tenant.tag, tenant.keys[0]))
        booking = tenant.first
        booking.turn = tenant.tag
        tenant.tag += booking.work_s / tenant.weight
        self.remove(booking)
        return booking

    def sent(self, tag: float, work: float) -> None:
        """One that was taken out goes to a replica; its work by its tenant's weight."""
        self._mean_work += _WEIGHT * (work - self._mean_work) if self._mean_work else work
        self.now = max(tag, self.now)
        if len(self._ends) > self._many_ends:
            self._ends = {name: end for name, end in self._ends.items() if end > self._earliest}
            self._many_ends = max(2 * len(self._ends), _FEW)

    def charge(self, name: str, work: float) -> None:
        """A tenant has had so much beside the queue, its weight reckoned with; or less, if it is negative."""
        if name in self.tenants:
            self.tenants[name].tag = self.tag_of(name) + work
        else:
            self._ends[name] = self.tag_of(name) + work

    def tag_of(self, name: str) -> float:
        """What a tenant's next booking has for a tag."""
        tenant = self.tenants.get(name)
        return tenant.tag if tenant is not None else max(self._ends.get(name, -math.inf), self._earliest)

    @property
    def _earliest(self) -> float:
        return self.now - max(self.credit, _LEAST_BURST * self._mean_work)

    def turn_of(self, name: str, key: _Key, weight: float) -> float:
        """What a tenant's booking of that key has for a tag, in the queue or not."""
        tenant = self.tenants.get(name)
        own_s = tenant.earlier_s(key) if tenant is not None else 0.0
        return self.tag_of(name) + own_s / weight

    def work_before(self, name: str, key: _Key, weight: float) -> float:
        """Work that goes before a tenant's booking of that key, in it or not: its own earlier ones', and of the others'
        what begins before its turn."""
        tenant = self.tenants.get(name)
        before_s = tenant.earlier_s(key) if tenant is not None else 0.0
        turn = self.tag_of(name) + before_s / weight
        for other, one in self.tenants.items():
            ahead = turn - one.tag
            if other != name and ahead > 0.0:
                before_s += min(one.work_s, ahead * one.weight + one.first.work_s)
        return before_s

    def in_order(self) -> Iterator[tuple[Booking, float]]:
        """Each waiting booking, in the order in which they go, with the work of this level that goes before it."""
        heap = [(one.tag, one.keys[0], 0, name) for name, one in self.tenants.items()]
        heapify(heap)
        before_s = 0.0
        while heap:
            tag, key, index, name = heap[0]
            tenant = self.tenants[name]
            booking = tenant.bookings[key]
            yield booking, before_s
            before_s += booking.work_s
            if index + 1 < len(tenant.keys):
                tag += booking.work_s / tenant.weight
                heapreplace(heap, (tag, tenant.keys[index + 1], index + 1, name))
            else:
                heappop(heap)


def _key_of(booking: Booking) -> _Key:
    return not booking.promised, booking.deadline_at, booking.key


class FairQueue:
    """Not thread-safe: the balancer's lock guards it.

    Args:
        weights: of tenants that are to have more or less than others; 1 for all who are not named.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        self._levels: dict[int, _Level] = {}
        self._queued: dict[int, Booking] = {}
        self._credit_s = 0.0
        self.num_tokens = 0.0

    def __len__(self) -> int:
        return len(self._queued)

    def __contains__(self, booking: Booking) -> bool:
        return booking.key in self._queued

    def __iter__(self) -> Iterator[Booking]:
        return iter(self._queued.values())

    @property
    def credit_s(self) -> float:
        """Replica-seconds that a tenant which has asked for less than its share may be ahead of it, a mean request or
        two at least: otherwise requests that come in a cluster by chance would be taken for a flood."""
        return self._credit_s

    @credit_s.setter
    def credit_s(self, credit_s: float) -> None:
        self._credit_s = credit_s
        for level in self._levels.values():
            level.credit = credit_s

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Go by other weights from now on."""
        self._weights = dict(weights)
        for level in self._levels.values():
            for name, tenant in level.tenants.items():
                tenant.weight = self._weight(name)

    @property
    def work_s(self) -> float:
        """Work of all who wait."""
        return sum(level.work_s for level in self._levels.values())

    def add(self, booking: Booking) -> None:
        """Queue it by its terms, `work_s` and `deadline_at`, which stay as they are until it is removed."""
        self._queued[booking.key] = booking
        self.num_tokens += booking.num_tokens
        level = self._level(booking.terms.priority)
        level.add(booking, self._weight(booking.terms.tenant))

    def remove(self, booking: Booking) -> None:
        """Take it out; it must be in."""
        self._levels[booking.terms.priority].remove(booking)
        self._removed(booking)

    def pop(self, priority: int | None = None) -> Booking | None:
        """Take out the next in turn, of that priority or of any; None if there is none. It has `turn` set, and is to be
        told of by `sent` or `refund`."""
        priorities = self.priorities if priority is None else [priority]
        level = self._levels.get(priorities[0]) if priorities else None
        if level is None or not level.tenants:
            return None
        booking = level.pop()
        self._removed(booking)
        return booking

    def sent(self, booking: Booking) -> None:
        """One that was taken out by `pop` goes to a replica."""
        weight = self._weight(booking.terms.tenant)
        self._levels[booking.terms.priority].sent(booking.turn, booking.work_s / weight)

    def refund(self, booking: Booking) -> None:
        """One that was taken out by `pop` does not."""
        self._charge(booking, -booking.work_s)

    def overtaken(self, booking: Booking) -> None:
        """One that was never in goes to a replica while others wait."""
        self._charge(booking, booking.work_s)

    def has_had_less(self, booking: Booking) -> bool:
        """Whether one that has its `turn` set is of a tenant that has asked for no more than its share."""
        level = self._levels.get(booking.terms.priority)
        return level is not None and booking.turn <= level.now

    def has_others(self, booking: Booking) -> bool:
        """Whether other tenants of its class wait."""
        level = self._levels.get(booking.terms.priority)
        return level is not None and len(level.tenants) > (booking.terms.tenant in level.tenants)

    @property
    def priorities(self) -> list[int]:
        """Those that somebody waits in, the first to go first."""
        return sorted(priority for priority, level in self._levels.items() if level.tenants)

    def newest(self, above: int) -> Booking | None:
        """The newest of the last priority, if that comes after `above`: who is to go when somebody must. One that was
        told to come now stays."""
        for priority in reversed(self.priorities):
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

    def next_turn(self, priority: int) -> float:
        """Of the next of that priority; infinite if nobody waits there."""
        level = self._levels.get(priority)
        return level.next_tag() if level is not None and level.tenants else math.inf

    def turn_of(self, booking: Booking) -> float:
        """What its `turn` is to be; it may be queued or not."""
        level = self._levels.get(booking.terms.priority)
        return level.turn_of(*self._place(booking)) if level is not None else 0.0

    def work_before(self, booking: Booking) -> float:
        """Work that will have gone before it, in replica-seconds, if nobody else comes; it may be queued or not."""
        priority = booking.terms.priority
        before_s = sum(level.work_s for other, level in self._levels.items() if other < priority)
        level = self._levels.get(priority)
        return before_s + (level.work_before(*self._place(booking)) if level is not None else 0.0)

    def in_order(self) -> Iterator[tuple[Booking, float]]:
        """Each waiting booking with the work that goes before it."""
        before_s = 0.0
        for priority in self.priorities:
            level = self._levels[priority]
            for booking, within_s in level.in_order():
                yield booking, before_s + within_s
            before_s += level.work_s

    def _charge(self, booking: Booking, work_s: float) -> None:
        level = self._level(booking.terms.priority)
        level.charge(booking.terms.tenant, work_s / self._weight(booking.terms.tenant))

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level()
            level.credit = self._credit_s
        return level

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _place(self, booking: Booking) -> tuple[str, _Key, float]:
        name = booking.terms.tenant
        return name, _key_of(booking), self._weight(name)

    def _removed(self, booking: Booking) -> None:
        del self._queued[booking.key]
        self.num_tokens -= booking.num_tokens
