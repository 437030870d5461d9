"""Admission: what no replica can begin soon waits here, in turn, or is refused and told when to come again.

One waiting room for all reasons to wait. Behind is the FairQueue; in front, in a window, those whose turn it is are
held until a replica is free for them. Whoever would have its first token too late is refused: at once, as
far as that can be foreseen, or when it turns out. Work is reckoned in replica-seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from app.balancer.booking import Booking
from app.balancer.cost import DEFAULT_PREFILL_TOKENS_PER_S
from app.balancer.fair_queue import FairQueue
from app.balancer.fleet import Fleet
from app.balancer.reservations import SHARE, Reservations
from app.balancer.service_rate import ServiceRate
from app.balancer.terms import DEFAULT_CLASS, Refusal, RefusalReason, RequestTerms

# At arrival the deadline counts as so much of itself: what is foreseen is not known.
_MARGIN = 0.7
# A prompt that takes nearly its deadline, or longer, may still wait for so much of it.
_LEAST_SLACK = 0.1
# Prompts may queue on a replica for so much of the shortest deadline.
_REPLICA_QUEUE_SHARE = 0.05
# Less would leave it idle until the next request comes.
_LEAST_REPLICA_QUEUE_S = 0.02
# Weight of a request in what first tokens take on replicas; they are not taken to be slower than foreseen by more.
_WEIGHT = 0.05
_MOST_STRETCH = 8.0
# Of what they take, 95 in 100 deviate by less than so many mean deviations.
_DEVIATIONS = 2.0
# Who will be late is looked for this often.
_SWEEP_INTERVAL_S = 0.1
# In the window are so many, at least, and one for four replicas: those behind it can still be overtaken.
_MIN_WINDOW = 1
_MAX_WINDOW = 32
# Seats that the work of a sequence is reckoned with where a replica has not told how many it has.
_SEATS = 64
# Without any replica, so many requests wait in Serve, which starts one for them; the others wait here.
MAX_IN_SERVE = 8
# A start is not foreseen.
_COLD_RETRY_S = 5.0


class ClassSettings(NamedTuple):
    """A class of requests. Of several the one of the lower `priority` goes first."""

    priority: int = 0
    ttft_deadline_s: float = 60.0


@dataclass(frozen=True)
class AdmissionSettings:
    """How one model's requests are admitted.

    Attributes:
        classes: by name.
        max_queued_requests, max_queued_tokens: bounds on what waits in an ingress; tokens are those of prompts not
            known to be cached, and expected output.
        tenant_header: a request may say whose it is; else that goes by its API key.
        tenant_weights: of tenants that are to have more or less than others, by the name that terms have.
        replica_queue_s: prompts that a replica has to compute before a request is sent there, at most; less if a
            class's deadline is short.
    """

    classes: Mapping[str, ClassSettings] = field(
        default_factory=lambda: MappingProxyType({DEFAULT_CLASS: ClassSettings()})
    )
    default_class: str = DEFAULT_CLASS
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4 << 20
    tenant_header: bool = False
    tenant_weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    replica_queue_s: float = 1.0


@dataclass(slots=True)
class AdmissionCounts:
    """What became of requests since the start, by class; refused ones by class and reason. `waited_s` is the sum over
    those that were sent on; of those, `promised` had been told to come."""

    admitted: dict[str, int] = field(default_factory=dict)
    waited_s: dict[str, float] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)
    refused: dict[tuple[str, RefusalReason], int] = field(default_factory=dict)


class AdmissionState(NamedTuple):
    """For metrics: the counts, and now by class how many wait; promises that are open; the share of them kept."""

    counts: AdmissionCounts = AdmissionCounts()
    queued: Mapping[str, int] = MappingProxyType({})
    num_promises: int = 0
    attendance: float = 1.0


class Admission:
    """Decides who waits, who goes next, and who goes away. Places nothing: that is the balancer's. Not thread-safe: the
    balancer's lock guards it.

    Attributes:
        reservations: what refused requests were told.
        counts: for metrics.
        window: those whose turn it is, by key.
        in_serve: keys of those that wait in Serve for the first replica.

    Args:
        turn: orders those in the window, the least first; without it they go as they came into it.
    """

    def __init__(
        self, settings: AdmissionSettings, fleet: Fleet, turn: Callable[[Booking, float], float] | None = None
    ) -> None:
        self._fleet = fleet
        self._turn = turn
        self._rate = ServiceRate()
        self._num_sent = 0
        # Moving averages of seconds from a replica's choice to the first token, as foreseen and as they came.
        self._foreseen_s = self._taken_s = 1e-3
        self._deviation_s = 0.0
        self._num_replicas = 0
        self._next_sweep_at = -math.inf
        self.reservations = Reservations()
        self.counts = AdmissionCounts()
        self.window: dict[int, Booking] = {}
        self.in_serve: set[int] = set()
        self._queue = FairQueue()
        self.reconfigure(settings)

    def reconfigure(self, settings: AdmissionSettings) -> None:
        """Go by other settings from now on. What waits keeps its terms, and is queued anew by its tenant's weight."""
        self.settings = settings
        shortest_s = min(entry.ttft_deadline_s for entry in settings.classes.values())
        share_s = max(_REPLICA_QUEUE_SHARE * shortest_s, _LEAST_REPLICA_QUEUE_S)
        self.replica_queue_s = min(settings.replica_queue_s, share_s)
        queued = sorted(self._queue, key=lambda booking: booking.key)
        self._queue = FairQueue(settings.tenant_weights)
        for booking in queued:
            self._queue.add(booking)

    def __len__(self) -> int:
        return len(self._queue) + len(self.window)

    @property
    def work_s(self) -> float:
        """Replica-seconds of what waits here."""
        return self._queue.work_s + sum(booking.work_s for booking in self.window.values())

    def state(self) -> AdmissionState:
        """For metrics."""
        reservations = self.reservations
        counts = copy.deepcopy(self.counts)
        return AdmissionState(counts, self._queued_by_class(), len(reservations), reservations.attendance)

    def _queued_by_class(self) -> dict[str, int]:
        counted = dict.fromkeys(self.settings.classes, 0)
        for booking in (*self._queue, *self.window.values()):
            counted[booking.terms.class_name] = counted.get(booking.terms.class_name, 0) + 1
        return counted

    # Arrival

    def arrived(self, booking: Booking, now: float) -> None:
        """A request has come."""
        terms = booking.terms
        booking.deadline_at = now + terms.ttft_deadline_s
        booking.promised = bool(terms.fingerprint) and self.reservations.claim(terms.fingerprint, now)

    def must_wait(self, booking: Booking) -> bool:
        """Whether somebody waits who goes before it."""
        priority = booking.terms.priority
        return any(other <= priority for other in self._queue.priorities) or any(
            one.terms.priority <= priority for one in self.window.values()
        )

    def measure(self, booking: Booking) -> None:
        """Reckon its work, from what the balancer's last choice for it said, or of any replica before there is one."""
        fleet, cost, slot = self._fleet, booking.cost, booking.slot
        output_tokens = cost.output_tokens * cost.num_sequences
        if slot < 0:
            booking.prefill_s = cost.prompt_tokens / DEFAULT_PREFILL_TOKENS_PER_S
            booking.work_s = booking.prefill_s
            booking.num_tokens = float(cost.prompt_tokens + output_tokens)
        else:
            seats = fleet.seats[slot] or _SEATS
            booking.work_s = booking.prefill_s + output_tokens * fleet.decode_step_s[slot] / seats
            booking.num_tokens = float(booking.uncached_tokens + output_tokens)

    def refusal(self, booking: Booking, now: float, num_replicas: int) -> Refusal | None:
        """Why a request that must wait cannot; None if it can. Others may have to go for it, if it is let in."""
        if num_replicas and not booking.promised:
            self._advance(now, num_replicas)
            rate = self._rate.rate(num_replicas)
            slack_s = self._slack_s(booking, _MARGIN * booking.terms.ttft_deadline_s)
            if math.isfinite(slack_s):
                # Those who are told to come meanwhile find room, but take no more than their share of it.
                due_s = self.reservations.due_work_s(booking.terms.tenant, now, slack_s)
                starts_s = self._ahead_s(booking) / rate + min(due_s / rate, SHARE * slack_s)
                if starts_s > slack_s:
                    message = f"its turn would come in about {starts_s:.1f} s, and its first token is due in "
                    message += f"{booking.terms.ttft_deadline_s:g} s"
                    return self._refuse(booking, now, "deadline", message, starts_s - slack_s)
        if self._is_full(booking) and self._victim(booking) is None:
            bounds = f"{self.settings.max_queued_requests} requests or {self.settings.max_queued_tokens} tokens"
            return self._refuse(booking, now, "full", f"no more than {bounds} may wait here")
        return None

    def enter(self, booking: Booking, now: float) -> list[tuple[Booking, Refusal]]:
        """Let a request wait. Returns those that had to go for it."""
        shed: list[tuple[Booking, Refusal]] = []
        while self._is_full(booking) and (victim := self._victim(booking)) is not None:
            self.remove(victim)
            shed.append((victim, self._refuse(victim, now, "shed", "it had to make room for others that go first")))
        self._queue.add(booking)
        self._advance(now, self._num_replicas)
        return shed

    def _is_full(self, booking: Booking) -> bool:
        settings, waiting = self.settings, len(self)
        tokens = self._queue.num_tokens + sum(one.num_tokens for one in self.window.values()) + booking.num_tokens
        # A single one may be larger than the bound.
        return waiting >= settings.max_queued_requests or (waiting > 0 and tokens > settings.max_queued_tokens)

    def _victim(self, booking: Booking) -> Booking | None:
        # Those who were told to come now go before their equals that were not.
        above = booking.terms.priority - booking.promised
        victim = self._queue.newest(above)
        if victim is None:
            outranked = [one for one in self.window.values() if one.terms.priority > above and not one.promised]
            victim = max(outranked, key=lambda one: (one.terms.priority, one.key), default=None)
        return victim

    # Who goes next

    def advance(self, now: float, num_replicas: int) -> list[tuple[Booking, Refusal]]:
        """Fill the window, and give up those who will be late. Returns the latter, which wait no more."""
        if num_replicas and not self._num_replicas:
            self._restart(now)
        self._advance(now, num_replicas)
        if not num_replicas:
            return []
        late: list[tuple[Booking, Refusal]] = []
        if now >= self._next_sweep_at:
            self._next_sweep_at = now + _SWEEP_INTERVAL_S
            late = self._sweep(now, num_replicas)
        # An order of its own needs some to choose from.
        size = min(max(_MIN_WINDOW, num_replicas // 4), _MAX_WINDOW) if self._turn is None else _MAX_WINDOW
        for priority in self._queue.priorities:
            # Those of a lower priority that are in the window take no place from it.
            room = size - sum(one.terms.priority <= priority for one in self.window.values())
            while room > 0 and (booking := self._queue.pop(priority)) is not None:
                self._to_window(booking)
                room -= 1
        return late

    def in_turn(self, now: float) -> list[Booking]:
        """The window, in the order in which a replica is to be looked for."""
        turn = self._turn
        if turn is None:
            # The first of each tenant, then the second: those who came into it before may not be others' equals.
            ranks: dict[tuple[int, str], int] = {}
            order = []
            for one in sorted(self.window.values(), key=lambda booking: booking.turn):
                tenant = (one.terms.priority, one.terms.tenant)
                ranks[tenant] = ranks.get(tenant, 0) + 1
                order.append((one.terms.priority, ranks[tenant], one.turn, one))
            return [one for *_, one in sorted(order)]
        return sorted(self.window.values(), key=lambda booking: (booking.terms.priority, turn(booking, now)))

    def next_for_serve(self) -> list[Booking]:
        """Without any replica: those who now wait in Serve, so that it starts one."""
        sent = []
        while len(self.in_serve) < MAX_IN_SERVE:
            booking = next(iter(self.window.values()), None) or self._queue.pop()
            if booking is None:
                break
            self.remove(booking)
            self.in_serve.add(booking.key)
            sent.append(booking)
        return sent

    def sent(self, booking: Booking, now: float) -> None:
        """It goes to a replica."""
        name = booking.terms.class_name
        self.remove(booking)
        if booking.resumes:
            return
        self._rate.sent(booking.work_s)
        self._advance(now, self._num_replicas)
        counts = self.counts
        counts.admitted[name] = counts.admitted.get(name, 0) + 1
        counts.waited_s[name] = counts.waited_s.get(name, 0.0) + now - booking.arrived_at
        if booking.promised:
            counts.promised[name] = counts.promised.get(name, 0) + 1

    def computed(self, booking: Booking, now: float) -> None:
        """It has its first token: how long that took on its replica is what others will find there."""
        if booking.resumes:
            return
        foreseen_s, taken_s = booking.predicted_wait_s + booking.prefill_s, now - booking.booked_at
        self._deviation_s += _WEIGHT * (abs(taken_s - self._stretch * foreseen_s) - self._deviation_s)
        self._foreseen_s += _WEIGHT * (foreseen_s - self._foreseen_s)
        self._taken_s += _WEIGHT * (taken_s - self._taken_s)

    @property
    def _stretch(self) -> float:
        return min(max(self._taken_s / self._foreseen_s, 1.0), _MOST_STRETCH)

    def remove(self, booking: Booking) -> None:
        """It waits no more, if it did."""
        self.in_serve.discard(booking.key)
        if self.window.pop(booking.key, None) is None and booking in self._queue:
            self._queue.remove(booking)

    def _to_window(self, booking: Booking) -> None:
        self._num_sent += 1
        booking.turn = self._num_sent
        self.window[booking.key] = booking

    def _advance(self, now: float, num_replicas: int) -> None:
        self._num_replicas = num_replicas
        self._rate.advance(now, bool(len(self)), num_replicas)

    def _ahead_s(self, booking: Booking) -> float:
        priority = booking.terms.priority
        window_s = sum(one.work_s for one in self.window.values() if one.terms.priority <= priority)
        return window_s + self._queue.work_before(booking)

    def _slack_s(self, booking: Booking, deadline_s: float) -> float:
        """How long it may wait here, for its first token to come in time."""
        # Decodes of others slow a prompt down, and so do calls and a busy machine.
        there_s = self._stretch * (booking.prefill_s + self.replica_queue_s) + _DEVIATIONS * self._deviation_s
        return max(deadline_s - there_s, _LEAST_SLACK * deadline_s)

    def _restart(self, now: float) -> None:
        """The first replica is there: nobody is late by what its start took."""
        queued = sorted(self._queue, key=lambda booking: booking.key)
        for booking in queued:
            self._queue.remove(booking)
        for booking in (*queued, *self.window.values()):
            booking.deadline_at = now + booking.terms.ttft_deadline_s
        for booking in queued:
            self._queue.add(booking)

    def _sweep(self, now: float, num_replicas: int) -> list[tuple[Booking, Refusal]]:
        rate = self._rate.rate(num_replicas)
        window_s = sum(one.work_s for one in self.window.values())
        late = [one for one in self.window.values() if now > self._latest_at(one)]
        late += [
            booking
            for booking, before_s in self._queue.in_order()
            if now + (window_s + before_s) / rate > self._latest_at(booking)
        ]
        found = []
        for booking in late:
            self.remove(booking)
            found.append((booking, self._refuse(booking, now, "late", "its turn did not come in time")))
        return found

    def _latest_at(self, booking: Booking) -> float:
        """When it must be sent, at the latest."""
        if booking.promised or not math.isfinite(booking.deadline_at):
            return booking.deadline_at
        deadline_s = booking.terms.ttft_deadline_s
        return booking.deadline_at - deadline_s + self._slack_s(booking, deadline_s)

    def _refuse(
        self, booking: Booking, now: float, reason: RefusalReason, why: str, earliest_s: float | None = None
    ) -> Refusal:
        terms = booking.terms
        counted = (terms.class_name, reason)
        self.counts.refused[counted] = self.counts.refused.get(counted, 0) + 1
        if self._num_replicas:
            rate = self._rate.rate(self._num_replicas)
            if earliest_s is None:
                earliest_s = max(self._ahead_s(booking) / rate - _MARGIN * terms.ttft_deadline_s, 0.0)
            after_s = self.reservations.promise(terms.fingerprint, terms.tenant, now, earliest_s, booking.work_s, rate)
        else:
            after_s = self.reservations.promise(
                terms.fingerprint, terms.tenant, now, _COLD_RETRY_S, booking.work_s, 1.0
            )
        return Refusal(reason, f"overloaded: {why}; try again in {after_s} s", after_s)


def terms_of_class(settings: AdmissionSettings, name: str | None = None) -> RequestTerms:
    """The terms of a class by its name, or of the default one. KeyError if there is none of that name."""
    name = settings.default_class if name is None else name
    entry = settings.classes[name]
    return RequestTerms(name, entry.priority, entry.ttft_deadline_s)
