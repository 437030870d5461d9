"""How many replicas a model needs: the decision, without Ray and without a clock of its own.

Work is counted in replicas: offered prompt tokens a second over what one replica computes in a second. As many are
needed that the first token comes in time (prompts queue as in M/G/c, by the approximation of Allen and Cunneen), that
none is busier than it may be, that what waits is worked off soon, and that sequences and their KV blocks find room. Up
at once, counting those that start, for the load that the trend foretells for when they are ready; down only where what
was needed at any time in the last `downscale_delay_s`, and a margin, fits into fewer.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from app.autoscaling.offered import OfferedLoad, Rates
from app.autoscaling.report import Observation, ReplicaReport

# Load is what came in the last so many seconds.
_WINDOW_S = 4.0
# What waits beyond the target's share below is to be worked off in so many times the first token's target.
_DRAIN_TARGETS = 4.0
# Of the first token's target, the part that queueing and computing a mean prompt may take: what is left is for longer
# prompts, for steps in progress, and for the way there and back.
_TARGET_SHARE = 0.9
# The first token's target is one for 95 of 100 requests.
_LATE_SHARE = 0.05
# Serve gives a deployment up whose first replica has failed to start twice: back at none, the next request tries again.
_MOST_FAILED_STARTS = 2
# Until then those who wait have been told, and ask for no further start.
_FAILED_REST_S = 3.0
# What a start is taken to last until one was seen, and the weight of a further one.
_DEFAULT_START_S = 5.0
_START_WEIGHT = 0.3


class SizingRules(NamedTuple):
    """What `deployment.autoscaling` says; see app.config.ScalingArgs."""

    min_replicas: int
    max_replicas: int
    upscale_delay_s: float = 1.0
    downscale_delay_s: float = 60.0
    idle_to_zero_s: float | None = None
    ttft_target_s: float = 1.0
    target_utilization: float = 0.8
    max_kv_use: float = 0.85
    downscale_margin: float = 0.1


class Decision(NamedTuple):
    """How many replicas there should be, and why in one line. `cause` is a word for counters."""

    num_replicas: int
    cause: str
    reason: str


class Need(NamedTuple):
    """Replicas that a load needs, and for what."""

    num_replicas: int
    cause: str


class Sizer:
    """Decides for one model, observation by observation."""

    def __init__(self, rules: SizingRules) -> None:
        self._rules = rules
        self._offered = OfferedLoad()
        self._capacity = 0.0
        self._max_num_seqs = 1.0
        self._start_s = _DEFAULT_START_S
        self._starts: deque[float] = deque()
        self._last: Observation | None = None
        self._short_since_s: float | None = None
        self._busy_at_s: float | None = None
        self._failed_before: int | None = None
        self._failed_at_s: float | None = None
        self._needs: deque[tuple[float, Need]] = deque()

    def decide(self, seen: Observation) -> Decision:
        """The number of replicas that the model is to have from now on."""
        rules = self._rules
        self._follow(seen)
        target = seen.target
        if self._gives_up(seen):
            return Decision(0, "failed", f"{_MOST_FAILED_STARTS} replicas in a row failed to start")
        if not seen.num_running:
            # What starts is let start; Serve itself starts the first for a request.
            return Decision(max(target, rules.min_replicas), "keep", "no replica is ready")
        if self._is_idle(seen):
            return Decision(0, "idle", f"nothing was asked for in {rules.idle_to_zero_s:g} s")
        now_s = seen.now_s
        backlog_s = self._backlog_s(seen)
        recent = self._offered.rates(now_s, _WINDOW_S)
        ahead_s = self._start_s + _WINDOW_S / 2
        trend = self._offered.trend(now_s)
        coming = recent._replace(prompt_tokens=recent.prompt_tokens + max(trend * ahead_s, 0.0))
        need = self._needed(seen, coming, backlog_s, 0.0)
        # A rate that falls is already lower than its average.
        spare = coming._replace(prompt_tokens=max(coming.prompt_tokens + min(trend, 0.0) * _WINDOW_S / 2, 0.0))
        self._remember(now_s, self._needed(seen, spare, backlog_s, rules.downscale_margin))
        number, cause = need
        if number > target:
            if self._short_since_s is None:
                self._short_since_s = now_s
            if now_s - self._short_since_s < rules.upscale_delay_s:
                number, cause = target, "keep"
            # Whatever is started is not let go before the delay.
            self._remember(now_s, need)
        else:
            self._short_since_s = None
            lowest = max((item for _, item in self._needs), key=lambda item: item.num_replicas)
            number, cause = (lowest.num_replicas, "spare") if lowest.num_replicas < target else (target, "keep")
        return Decision(number, cause, self._describe(seen, recent, coming, backlog_s))

    # What is known

    def _follow(self, seen: Observation) -> None:
        now_s, last = seen.now_s, self._last
        self._last = seen
        self._offered.observe(now_s, seen.reports)
        known = [report.prompt_tokens_per_s for report in seen.reports.values() if report.prompt_tokens_per_s > 0]
        if known:
            # Kept when all have gone, for the next that wakes.
            self._capacity = sum(known) / len(known)
        if seen.reports:
            self._max_num_seqs = max(report.max_num_seqs for report in seen.reports.values())
        if last is None:
            return
        for _ in range(last.target, seen.target):
            self._starts.append(now_s)
        for _ in range(last.num_running, seen.num_running):
            if self._starts:
                self._start_s += (now_s - self._starts.popleft() - self._start_s) * _START_WEIGHT
        while len(self._starts) > max(seen.target - seen.num_running, 0):
            self._starts.pop()

    def _gives_up(self, seen: Observation) -> bool:
        """Whether a model that may have no replica is not to be started until somebody asks again.

        Serve itself decides while requests wait for a first replica: here nobody does.
        """
        if self._failed_before is None or seen.num_running or not seen.target:
            self._failed_before, self._failed_at_s = seen.failed_starts, None
        if self._rules.min_replicas or seen.failed_starts - self._failed_before < _MOST_FAILED_STARTS:
            return False
        if self._failed_at_s is None:
            self._failed_at_s = seen.now_s
        return seen.now_s - self._failed_at_s >= _FAILED_REST_S

    def _is_idle(self, seen: Observation) -> bool:
        """Whether nothing has been asked for as long as `idle_to_zero_s`, and nothing runs."""
        if self._rules.idle_to_zero_s is None:
            return False
        requests = self._offered.rates(seen.now_s, 1.0).requests
        works = any(report.num_running or report.num_waiting or report.queued_s for report in seen.reports.values())
        if self._busy_at_s is None or works or requests or seen.open_requests or not seen.reports:
            self._busy_at_s = seen.now_s
        return seen.now_s - self._busy_at_s >= self._rules.idle_to_zero_s

    def _backlog_s(self, seen: Observation) -> float:
        """Seconds of one replica's work that wait, in ingresses and on replicas."""
        reports = seen.reports.values()
        tokens = sum(report.num_waiting_tokens for report in reports)
        return queued_s(list(reports)) + (tokens / self._capacity if self._capacity else 0.0)

    # What is needed

    def _needed(self, seen: Observation, rates: Rates, backlog_s: float, margin: float) -> Need:
        """The least that carries a load, `margin` more of it included."""
        rules = self._rules
        need = Need(max(rules.min_replicas, 1), "minimum")
        if self._capacity:
            work = rates.prompt_tokens / self._capacity * (1.0 + margin)
            number = need.num_replicas
            while number < rules.max_replicas and not self._in_time(number, work, rates):
                number += 1
            need = _larger(need, number, "prompts")
            # By the time that a replica has started the queue has grown, or shrunk.
            queue_s = max(0.0, backlog_s + (work - seen.num_running) * self._start_s)
            borne_s = seen.num_running * _TARGET_SHARE * rules.ttft_target_s
            if backlog_s > borne_s and queue_s > borne_s:
                drain_s = _DRAIN_TARGETS * rules.ttft_target_s
                need = _larger(need, math.ceil(work + (queue_s - borne_s) / drain_s), "queue")
        reports = seen.reports.values()
        running = sum(report.num_running for report in reports)
        if rates.drawn_tokens:
            # Each sequence draws a token in so long; that many run when all that is offered decodes.
            running = max(running, rates.output_tokens * running / rates.drawn_tokens)
        bound = self._max_num_seqs * rules.target_utilization
        need = _larger(need, math.ceil(running * (1.0 + margin) / bound), "sequences")
        kv_use = sum(report.kv_use for report in reports) * (1.0 + margin)
        need = _larger(need, math.ceil(kv_use / rules.max_kv_use), "kv")
        return Need(min(need.num_replicas, rules.max_replicas), need.cause)

    def _in_time(self, number: int, work: float, rates: Rates) -> bool:
        """Whether so many keep the first token's target, and their utilization."""
        if work > number * self._rules.target_utilization:
            return False
        prompt_s = rates.mean_prompt / self._capacity
        wait_s = late_wait_s(number, work, prompt_s, _LATE_SHARE) * (1.0 + rates.prompt_variation) / 2
        return wait_s + prompt_s <= _TARGET_SHARE * self._rules.ttft_target_s

    def _remember(self, now_s: float, need: Need) -> None:
        """Keep what was needed in the last `downscale_delay_s`, as far as it can still be the most.

        Or as long as a start takes, if that is longer: what could not come back sooner is not let go.
        """
        while self._needs and self._needs[-1][1].num_replicas <= need.num_replicas:
            self._needs.pop()
        self._needs.append((now_s, need))
        while self._needs[0][0] < now_s - max(self._rules.downscale_delay_s, self._start_s):
            self._needs.popleft()

    def _describe(self, seen: Observation, recent: Rates, coming: Rates, backlog_s: float) -> str:
        reports = seen.reports.values()
        capacity = self._capacity or math.inf
        kv_use = max((report.kv_use for report in reports), default=0.0)
        return (
            f"prompts ask for {recent.prompt_tokens / capacity:.2f} replicas, soon "
            f"{coming.prompt_tokens / capacity:.2f}; {backlog_s:.1f} s wait; "
            f"{sum(report.num_running for report in reports):.0f} requests run; KV {100 * kv_use:.0f} %; "
            f"{seen.num_running} replicas ready, a start takes {self._start_s:.1f} s"
        )


def queued_s(reports: list[ReplicaReport]) -> float:
    """What waits in all ingresses, from the replicas' shares of it.

    While one of the replicas is new, ingresses have told the others of larger shares than it leaves them: the sum of
    shares then exceeds the ingresses, by as much as the sum of what waits exceeds the truth.
    """
    shares = sum(report.demand_shares for report in reports)
    num_ingresses = max((report.num_ingresses for report in reports), default=0.0)
    return sum(report.queued_s for report in reports) * num_ingresses / shares if shares else 0.0


def late_wait_s(number: int, work: float, prompt_s: float, late: float) -> float:
    """How long those wait who wait longest, a share `late` of all, for one of `number` replicas: M/M/c.

    Args:
        work: replicas that are busy on average.
        prompt_s: seconds that a mean prompt takes.
    """
    if work <= 0.0:
        return 0.0
    if work >= number:
        return math.inf
    # Erlang's formula B, then C, the probability of waiting at all.
    blocked = 1.0
    for servers in range(1, number + 1):
        blocked = work * blocked / (servers + work * blocked)
    waits = number * blocked / (number - work * (1.0 - blocked))
    return math.log(waits / late) * prompt_s / (number - work) if waits > late else 0.0


def _larger(need: Need, number: int, cause: str) -> Need:
    return Need(number, cause) if number > need.num_replicas else need
