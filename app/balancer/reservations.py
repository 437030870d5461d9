"""What refused requests were told: each a time of its own, at which there is to be room for it.

A share of what can be served is given away in advance, like tokens of a bucket: whoever is refused gets the next
second of it that is not yet another's; tenants who are refused share it, so that nobody is told to come after all of
a flood. A request that comes again then is known by its fingerprint, and let in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

# Of what is served, so much is promised away at most: the rest is for those who come for the first time.
SHARE = 0.3
MAX_RETRY_AFTER_S = 3600
# Promises kept: of more, later ones are told a time, but are not known when they come back.
MAX_PROMISES = 32768
# Who comes so much early, or late, was told to come now; the longer it waited, the later it may be.
_EARLY_S = 0.25
_LATE_S = 2.0
_LATE_SHARE = 0.25
# Who is so late is not waited for any more.
_EXPECTED_FOR_S = 2.0
# Weight of one more promise in the share of those who come back; that is never taken to be less than the least.
_WEIGHT = 0.02
_LEAST_ATTENDANCE = 0.1


class News(NamedTuple):
    """What an ingress tells the others. `made` has fingerprint, tenant, seconds until due and until its end, and work;
    `kept` the fingerprints of those who came."""

    made: list[tuple[int, str, float, float, float]]
    kept: list[int]


@dataclass(slots=True, eq=False)
class _Promise:
    """`expected`: its work is still counted on. `ended`: kept, or too late."""

    fingerprint: int
    tenant: str
    due_at: float
    valid_until: float
    work_s: float
    expected: bool = True
    ended: bool = False


class Reservations:
    """The promises of one model, those of other ingresses included. Not thread-safe: the balancer's lock guards it.

    Attributes:
        attendance: share of those promised a time that came back.
    """

    def __init__(self) -> None:
        self.attendance = 1.0
        # By tenant, how far what is promised reaches.
        self._promised_until: dict[str, float] = {}
        # When to look at each of them again: what is promised may reach further by then.
        self._reaches: list[tuple[float, str]] = []
        self._promises: dict[int, list[_Promise]] = {}
        self._num_promises = 0
        self._num_made = 0
        # By tenant, work by the second in which it is due, of those who are still expected.
        self._due_s: dict[str, dict[int, float]] = {}
        # By the time at which they are not expected any more, or end.
        self._timers: list[tuple[float, int, _Promise]] = []
        self._news = News([], [])
        self._new: list[_Promise] = []

    def __len__(self) -> int:
        return self._num_promises

    def promise(self, fingerprint: int, tenant: str, now: float, earliest_s: float, work_s: float, rate: float) -> int:
        """A time for a request that is refused, in whole seconds from now.

        Args:
            fingerprint: 0 is told a time, too, but cannot be known again.
            earliest_s: seconds until there may be room for it.
            rate: replica-seconds of work that are served a second.
        """
        self.advance(now)
        until = max(self._promised_until.get(tenant, now), now + earliest_s)
        while self._reaches and self._reaches[0][0] <= now:
            other = heappop(self._reaches)[1]
            if self._promised_until[other] <= now:
                del self._promised_until[other]
            else:
                heappush(self._reaches, (self._promised_until[other], other))
        is_new = tenant not in self._promised_until
        num_tenants = len(self._promised_until) + is_new
        until += max(self.attendance, _LEAST_ATTENDANCE) * work_s * num_tenants / (rate * SHARE)
        after_s = min(max(math.ceil(until - now), 1), MAX_RETRY_AFTER_S)
        self._promised_until[tenant] = min(until, now + MAX_RETRY_AFTER_S)
        if is_new:
            heappush(self._reaches, (self._promised_until[tenant], tenant))
        if fingerprint and self._num_promises < MAX_PROMISES:
            due_at = now + after_s
            promise = _Promise(fingerprint, tenant, due_at, due_at + _LATE_S + _LATE_SHARE * after_s, work_s)
            self._add(promise)
            self._new.append(promise)
        return after_s

    def claim(self, fingerprint: int, now: float) -> bool:
        """Whether a request that comes now was told to; its promise is kept by that."""
        self.advance(now)
        promise = self._first(fingerprint)
        if promise is None or now < promise.due_at - _EARLY_S:
            return False
        self._keep(promise)
        self._news.kept.append(fingerprint)
        return True

    def due_work_s(self, tenant: str, now: float, within_s: float) -> float:
        """Work of those who are expected to come back until then, as far as they do: this tenant's own, and no more of
        each other's."""
        self.advance(now)
        own_s = self._due_of(tenant, now, within_s)
        if not own_s:
            return 0.0
        others_s = (min(self._due_of(other, now, within_s), own_s) for other in self._due_s if other != tenant)
        return (own_s + sum(others_s)) * self.attendance

    def _due_of(self, tenant: str, now: float, within_s: float) -> float:
        due_s = self._due_s.get(tenant, {})
        if within_s > len(due_s):
            return sum(work_s for second, work_s in due_s.items() if second <= now + within_s)
        seconds = range(math.floor(now - _EXPECTED_FOR_S), math.floor(now + within_s) + 1)
        return sum(due_s.get(second, 0.0) for second in seconds)

    def advance(self, now: float) -> None:
        """Give up on those who are late."""
        while self._timers and self._timers[0][0] <= now:
            _, number, promise = heappop(self._timers)
            if promise.ended:
                continue
            if promise.expected:
                self._expect_no_more(promise)
                self._came(0.0)
                heappush(self._timers, (promise.valid_until, number, promise))
            else:
                self._end(promise)

    def take_news(self, now: float) -> News:
        """What has happened here since the last call."""
        made = [(one.fingerprint, one.tenant, one.due_at - now, one.valid_until - now, one.work_s) for one in self._new]
        news, self._news, self._new = News(made, self._news.kept), News([], []), []
        return news

    def hear(self, news: News, now: float) -> None:
        """What has happened at another ingress."""
        self.advance(now)
        for fingerprint, tenant, due_s, valid_s, work_s in news.made:
            if self._num_promises < MAX_PROMISES:
                self._add(_Promise(fingerprint, tenant, now + due_s, now + valid_s, work_s))
        for fingerprint in news.kept:
            promise = self._first(fingerprint)
            if promise is not None:
                self._keep(promise)

    def _first(self, fingerprint: int) -> _Promise | None:
        promises = self._promises.get(fingerprint)
        return min(promises, key=lambda promise: promise.due_at) if promises else None

    def _add(self, promise: _Promise) -> None:
        self._promises.setdefault(promise.fingerprint, []).append(promise)
        self._num_promises += 1
        self._num_made += 1
        second = math.floor(promise.due_at)
        due_s = self._due_s.setdefault(promise.tenant, {})
        due_s[second] = due_s.get(second, 0.0) + promise.work_s
        heappush(self._timers, (promise.due_at + _EXPECTED_FOR_S, self._num_made, promise))

    def _keep(self, promise: _Promise) -> None:
        if promise.expected:
            self._expect_no_more(promise)
        self._came(1.0)
        self._end(promise)

    def _came(self, value: float) -> None:
        self.attendance += _WEIGHT * (value - self.attendance)

    def _expect_no_more(self, promise: _Promise) -> None:
        promise.expected = False
        second = math.floor(promise.due_at)
        due_s = self._due_s[promise.tenant]
        due_s[second] -= promise.work_s
        if due_s[second] < 1e-9:
            del due_s[second]
        if not due_s:
            del self._due_s[promise.tenant]

    def _end(self, promise: _Promise) -> None:
        promise.ended = True
        promises = self._promises[promise.fingerprint]
        promises.remove(promise)
        if not promises:
            del self._promises[promise.fingerprint]
        self._num_promises -= 1
