"""Admission: what no replica can begin soon waits here, in turn, or is refused and told when to come again.

One waiting room for all reasons to wait. Behind is the FairQueue; in front, in a window, those whose turn it is are
held until a replica is free for them. Whoever would have its first token too late is refused: at once, as
far as that can be foreseen, or when it turns out. Work is reckoned in replica-seconds.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from app.balancer.admission_settings import AdmissionSettings
from app.balancer.booking import Booking
from app.balancer.cost import DEFAULT_PREFILL_TOKENS_PER_S
from app.balancer.fair_queue import FairQueue
from app.balancer.fleet import Fleet
from app.balancer.foresight import Foresight
from app.balancer.reservations import SHARE, News, Reservations
from app.balancer.terms import Refusal, RefusalReason

# At arrival the deadline counts as so much of itself: what is foreseen is not known.
_MARGIN = 0.7
# Prompts may queue on a replica for so much of the shortest deadline.
_REPLICA_QUEUE_SHARE = 0.05
# Less would leave it idle until the next request comes.
_LEAST_REPLICA_QUEUE_S = 0.02
# A request of a tenant within its share may find so many times that there: so it goes before those that wait at other
# ingresses, too.
_DUE_QUEUE = 2.0
# Ingresses that all have somebody waiting would all send to a replica as it comes free. Each draws how full it may be,
# so that mostly one of them does, and the others hear of it.
_QUEUE_SHARES = (0.6, 1.2)
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
        turn: orders those in the window, the least first; without it the FairQueue does.
        draw: where chance comes from.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        fleet: Fleet,
        turn: Callable[[Booking, float], float] | None = None,
        draw: random.Random | None = None,
    ) -> None:
        self._fleet = fleet
        self._turn = turn
        self._draw = draw or random.Random()
        self._competes = False
        self._queue_share = 1.0
        self._foresight = Foresight()
        self._next_sweep_at = -math.inf
        self.reservations = Reservations()
        self.counts = AdmissionCounts()
        self.window: dict[int, Booking] = {}
        self.in_serve: set[int] = set()
        self._queue = FairQueue()
        self.reconfigure(settings)

    def reconfigure(self, settings: AdmissionSettings) -> None:
        """Go by other settings from now on. What waits keeps its terms."""
        self.settings = settings
        shortest_s = min(entry.ttft_deadline_s for entry in settings.classes.values())
        share_s = max(_REPLICA_QUEUE_SHARE * shortest_s, _LEAST_REPLICA_QUEUE_S)
        self.replica_queue_s = min(settings.replica_queue_s, share_s)
        self._queue.set_weights(settings.tenant_weights)

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
        if self._turn is not None:
            return any(other <= priority for other in self._queue.priorities) or any(
                one.terms.priority <= priority for one in self.window.values()
            )
        booking.turn = self._queue.turn_of(booking)
        place = (priority, booking.turn)
        return any((other, self._queue.next_turn(other)) <= place for other in self._queue.priorities) or any(
            (one.terms.priority, one.turn) <= place for one in self.window.values()
        )

    def longest_wait_s(self, booking: Booking) -> float:
        """For prompts queued on a replica, if it is to be sent there. Its `turn` is set."""
        if self._turn is None and self._queue.is_due(booking):
            return _DUE_QUEUE * self.replica_queue_s
        return self._queue_share * self.replica_queue_s

    def hear(self, news: News, now: float) -> None:
        """What another ingress has told requests that it refused: it competes for the same replicas."""
        self._competes = True
        self.reservations.hear(news, now)

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
            rate = self._foresight.rate
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
        self._advance(now, self._foresight.num_replicas)
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
        if num_replicas and not self._foresight.num_replicas:
            self._restart(now)
        self._advance(now, num_replicas)
        if not num_replicas:
            return []
        late: list[tuple[Booking, Refusal]] = []
        if now >= self._next_sweep_at:
            self._next_sweep_at = now + _SWEEP_INTERVAL_S
            late = self._sweep(now)
        # An order of its own needs some to choose from.
        size = min(max(_MIN_WINDOW, num_replicas // 4), _MAX_WINDOW) if self._turn is None else _MAX_WINDOW
        for priority in self._queue.priorities:
            # Those of a lower priority that are in the window take no place from it.
            inside = [one for one in self.window.values() if one.terms.priority <= priority]
            # Whoever goes before one in the window belongs there, too, unless that has another order.
            ours = [one.turn for one in inside if one.terms.priority == priority and self._turn is None]
            last = max(ours, default=-math.inf)
            room = size - len(inside)
            while room > 0 or (room > -_MAX_WINDOW and self._queue.next_turn(priority) < last):
                booking = self._queue.pop(priority)
                if booking is None:
                    break
                self.window[booking.key] = booking
                room -= 1
        return late

    def in_turn(self, now: float) -> list[Booking]:
        """The window, in the order in which a replica is to be looked for."""
        turn = self._turn
        if turn is None:
            return sorted(self.window.values(), key=lambda booking: (booking.terms.priority, booking.turn, booking.key))
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
        if self.window.pop(booking.key, None) is not None:
            self._queue.sent(booking)
        elif len(self) and not booking.resumes:
            self._queue.overtaken(booking)
        if self._competes:
            self._queue_share = self._draw.uniform(*_QUEUE_SHARES)
        self.remove(booking)
        if booking.resumes:
            return
        self._foresight.sent(booking)
        self._advance(now, self._foresight.num_replicas)
        counts = self.counts
        counts.admitted[name] = counts.admitted.get(name, 0) + 1
        counts.waited_s[name] = counts.waited_s.get(name, 0.0) + now - booking.arrived_at
        if booking.promised:
            counts.promised[name] = counts.promised.get(name, 0) + 1

    def computed(self, booking: Booking, now: float) -> None:
        """It has its first token: how long that took on its replica is what others will find there."""
        if not booking.resumes:
            self._foresight.computed(booking, now)

    def remove(self, booking: Booking) -> None:
        """It waits no more, if it did."""
        self.in_serve.discard(booking.key)
        if self.window.pop(booking.key, None) is not None:
            self._queue.refund(booking)
        elif booking in self._queue:
            self._queue.remove(booking)

    def _advance(self, now: float, num_replicas: int) -> None:
        self._foresight.advance(now, num_replicas, waiting=bool(len(self)))

    def _ahead_s(self, booking: Booking) -> float:
        turn = (booking.terms.priority, self._queue.turn_of(booking))
        window_s = sum(one.work_s for one in self.window.values() if (one.terms.priority, one.turn) <= turn)
        return window_s + self._queue.work_before(booking)

    def _slack_s(self, booking: Booking, deadline_s: float) -> float:
        return self._foresight.slack_s(booking.prefill_s, self.replica_queue_s, deadline_s)

    def _restart(self, now: float) -> None:
        """The first replica is there: nobody is late by what its start took."""
        queued = sorted(self._queue, key=lambda booking: booking.key)
        for booking in queued:
            self._queue.remove(booking)
        for booking in (*queued, *self.window.values()):
            booking.deadline_at = now + booking.terms.ttft_deadline_s
        for booking in queued:
            self._queue.add(booking)

    def _sweep(self, now: float) -> list[tuple[Booking, Refusal]]:
        rate = self._foresight.rate
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
        if self._foresight.num_replicas:
            rate = self._foresight.rate
            if earliest_s is None:
                earliest_s = max(self._ahead_s(booking) / rate - _MARGIN * terms.ttft_deadline_s, 0.0)
            after_s = self.reservations.promise(terms.fingerprint, terms.tenant, now, earliest_s, booking.work_s, rate)
        else:
            after_s = self.reservations.promise(
                terms.fingerprint, terms.tenant, now, _COLD_RETRY_S, booking.work_s, 1.0
            )
        return Refusal(reason, f"overloaded: {why}; try again in {after_s} s", after_s)
