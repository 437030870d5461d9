"""Admission: what no replica can begin soon waits here, in turn, or is refused and told when to come again.

One waiting room for all reasons to wait. Whoever would have its first token too late is refused: at once, as far as
that can be foreseen, or when it turns out. Work is reckoned in replica-seconds.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable

from app.balancer.admission_counts import AdmissionCounts, AdmissionState
from app.balancer.admission_settings import AdmissionSettings
from app.balancer.booking import Booking
from app.balancer.cost import DEFAULT_PREFILL_TOKENS_PER_S
from app.balancer.fleet import Fleet
from app.balancer.foresight import Foresight
from app.balancer.replica_queue import ReplicaQueue
from app.balancer.reservations import SHARE, News, Reservations
from app.balancer.terms import Refusal, RefusalReason
from app.balancer.waiting_room import WaitingRoom

# At arrival the deadline counts as so much of itself: what is foreseen is not known, and others may come who go first.
# They may not where its tenant has had less than its share.
_MARGIN = 0.7
# Who will be late is looked for this often.
_SWEEP_INTERVAL_S = 0.1
# A tenant that has asked for less than its share may have what is served here in so many seconds, or within the
# shortest deadline if that is sooner, before it counts as one that asks for more.
_CREDIT_S = 3.0
# Seats that the work of a sequence is reckoned with where a replica has not told how many it has.
_SEATS = 64
# Without any replica, so many requests wait in Serve, which starts one for them; the others wait here.
MAX_IN_SERVE = 8
# A start is not foreseen.
_COLD_RETRY_S = 5.0


class Admission:
    """Decides who waits, who goes next, and who goes away. Places nothing: that is the balancer's. Not thread-safe: the
    balancer's lock guards it.

    Attributes:
        reservations: what refused requests were told.
        counts: for metrics.
        replica_queue: what may be queued where a request is sent.
        in_serve: keys of those that wait in Serve for the first replica.

    Args:
        turn: orders those whose turn it is; see WaitingRoom.
        draw: where chance comes from.
    """

    def __init__(
        self,
        settings: AdmissionSettings,
        fleet: Fleet,
        turn: Callable[[Booking, float], float] | None = None,
        draw: random.Random | None = None,
    ) -> None:
        self.replica_queue = ReplicaQueue(settings, draw or random.Random())
        self.reservations = Reservations()
        self.counts = AdmissionCounts()
        self.in_serve: set[int] = set()
        self._fleet = fleet
        self._foresight = Foresight()
        self._next_sweep_at = -math.inf
        self._room = WaitingRoom(turn)
        self.reconfigure(settings)

    def reconfigure(self, settings: AdmissionSettings) -> None:
        """Go by other settings from now on. What waits keeps its terms."""
        self.settings = settings
        self._credit_s = min(_CREDIT_S, *(entry.ttft_deadline_s for entry in settings.classes.values()))
        self.replica_queue.reconfigure(settings)
        self._room.set_weights(settings.tenant_weights)

    def __len__(self) -> int:
        return len(self._room)

    @property
    def work_s(self) -> float:
        """Replica-seconds of what waits here."""
        return self._room.work_s

    def state(self) -> AdmissionState:
        """For metrics."""
        queued = dict.fromkeys(self.settings.classes, 0)
        for booking in self._room:
            queued[booking.terms.class_name] = queued.get(booking.terms.class_name, 0) + 1
        reservations = self.reservations
        return AdmissionState(copy.deepcopy(self.counts), queued, len(reservations), reservations.attendance)

    # Arrival

    def arrived(self, booking: Booking, now: float) -> None:
        """A request has come."""
        terms = booking.terms
        booking.deadline_at = now + terms.ttft_deadline_s
        booking.promised = bool(terms.fingerprint) and self.reservations.claim(terms.fingerprint, now)

    def must_wait(self, booking: Booking) -> bool:
        """Whether somebody waits who goes before it."""
        return not self._room.goes_first(booking)

    def longest_wait_s(self, booking: Booking) -> float:
        """For prompts queued on a replica, if it is to be sent there. Its `turn` is set if anybody waits."""
        is_due = len(self._room) > 0 and (booking.promised or self._room.is_due(booking))
        return self.replica_queue.longest_s(is_due=is_due)

    def hear(self, news: News, now: float) -> None:
        """What another ingress has told requests that it refused: it competes for the same replicas."""
        self.replica_queue.compete()
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
            margin = 1.0 if self._room.is_due(booking) else _MARGIN
            slack_s = self._slack_s(booking, margin * booking.terms.ttft_deadline_s)
            if math.isfinite(slack_s):
                # Those who are told to come meanwhile find room, but take no more than their share of it.
                due_s = self.reservations.due_work_s(booking.terms.tenant, now, slack_s)
                starts_s = self._room.ahead_s(booking) / rate + min(due_s / rate, SHARE * slack_s)
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
            self._room.remove(victim)
            shed.append((victim, self._refuse(victim, now, "shed", "it had to make room for others that go first")))
        self._room.add(booking)
        self._advance(now, self._foresight.num_replicas)
        return shed

    def _is_full(self, booking: Booking) -> bool:
        settings, waiting = self.settings, len(self._room)
        if waiting >= settings.max_queued_requests:
            return True
        # A single one may be larger than the bound.
        return waiting > 0 and self._room.num_tokens + booking.num_tokens > settings.max_queued_tokens

    def _victim(self, booking: Booking) -> Booking | None:
        # Those who were told to come now go before their equals that were not.
        return self._room.victim(booking.terms.priority - booking.promised)

    # Who goes next

    def advance(self, now: float, num_replicas: int) -> list[tuple[Booking, Refusal]]:
        """Look whose turn it is, and give up those who will be late. Returns the latter, which wait no more."""
        if num_replicas and not self._foresight.num_replicas:
            # The first replica is there: nobody is late by what its start took.
            self._room.restart(now)
        self._advance(now, num_replicas)
        if not num_replicas:
            return []
        late: list[tuple[Booking, Refusal]] = []
        if now >= self._next_sweep_at:
            self._next_sweep_at = now + _SWEEP_INTERVAL_S
            late = self._sweep(now)
        self._room.fill_window(num_replicas)
        return late

    def in_turn(self, now: float) -> list[Booking]:
        """Those whose turn it is, in the order in which a replica is to be looked for."""
        return self._room.in_turn(now)

    def next_for_serve(self) -> list[Booking]:
        """Without any replica: those who now wait in Serve, so that it starts one."""
        sent = []
        while len(self.in_serve) < MAX_IN_SERVE and (booking := self._room.pop()) is not None:
            self.in_serve.add(booking.key)
            sent.append(booking)
        return sent

    def sent(self, booking: Booking, now: float) -> None:
        """It goes to a replica."""
        self.in_serve.discard(booking.key)
        self._room.sent(booking)
        self.replica_queue.sent()
        if booking.resumes:
            return
        self._foresight.sent(booking)
        self._advance(now, self._foresight.num_replicas)
        self.counts.sent(booking, now)

    def computed(self, booking: Booking, now: float) -> None:
        """It has its first token: how long that took on its replica is what others will find there."""
        if not booking.resumes:
            self._foresight.computed(booking, now)

    def remove(self, booking: Booking) -> None:
        """It waits no more, if it did."""
        self.in_serve.discard(booking.key)
        self._room.remove(booking)

    def _advance(self, now: float, num_replicas: int) -> None:
        waiting = len(self._room) > 0
        self._foresight.advance(now, num_replicas, waiting=waiting)
        if waiting and num_replicas:
            self._room.set_credit(self._foresight.rate * self._credit_s)

    def _slack_s(self, booking: Booking, deadline_s: float) -> float:
        return self._foresight.slack_s(booking.prefill_s, self.replica_queue.seconds, deadline_s)

    def _sweep(self, now: float) -> list[tuple[Booking, Refusal]]:
        rate = self._foresight.rate
        late = [
            booking for booking, before_s in self._room.in_order() if now + before_s / rate > self._latest_at(booking)
        ]
        found = []
        for booking in late:
            self._room.remove(booking)
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
        self.counts.refuse(booking, reason)
        rate = 1.0
        if self._foresight.num_replicas:
            rate = self._foresight.rate
            if earliest_s is None:
                earliest_s = max(self._room.ahead_s(booking) / rate - _MARGIN * terms.ttft_deadline_s, 0.0)
        else:
            earliest_s = _COLD_RETRY_S
        after_s = self.reservations.promise(terms.fingerprint, terms.tenant, now, earliest_s, booking.work_s, rate)
        return Refusal(reason, f"overloaded: {why}; try again in {after_s} s", after_s)
