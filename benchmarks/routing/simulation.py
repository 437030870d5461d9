"""Discrete events around the balancer's own code: arrivals, reports on their way, first and last tokens."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from app.balancer import Balancer, Policy, RequestCost
from benchmarks.routing.replica import Model, Progress, Replica
from benchmarks.routing.trace import BLOCK_SIZE, Arrival

# What a request is expected to produce, whatever it will: a balancer cannot know.
_EXPECTED_OUTPUT_TOKENS = 343

# Simulated replicas send no heartbeats, and never fail.
_NEVER_S = 1e9


class FleetSetup(NamedTuple):
    """The simulated fleet.

    Attributes:
        staleness_s: age of all that a replica tells when an ingress hears it. Bookings an ingress knows at once.
        num_ingresses: each with a balancer of its own; requests go to them in turn.
        hold_s: as Balancer's.
    """

    num_replicas: int
    model: Model
    staleness_s: float = 0.0
    num_ingresses: int = 1
    hold_s: float | None = None


@dataclass(slots=True)
class Outcome:
    """One policy's run. Times in seconds, by request in order of last tokens; decisions in microseconds."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    decision_us: list[float] = field(default_factory=list)
    dispatch_us: float = 0.0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    misjudged_requests: int = 0
    busy_s: list[float] = field(default_factory=list)
    end_s: float = 0.0


class Simulation:
    """Runs one policy over one list of arrivals."""

    def __init__(self, setup: FleetSetup, make_policy: Callable[[], Policy]) -> None:
        self._setup = setup
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._replicas = [setup.model.make_replica(self._at) for _ in range(setup.num_replicas)]
        self._names = [f"r{index}" for index in range(setup.num_replicas)]
        self._index_of = {name: index for index, name in enumerate(self._names)}
        self._balancers = [
            Balancer(
                make_policy(),
                hold_s=setup.hold_s,
                silent_after_s=_NEVER_S,
                stale_after_s=_NEVER_S,
                expire_after_s=_NEVER_S,
                clock=self._clock,
            )
            for _ in range(setup.num_ingresses)
        ]
        self._timer_at = [float("inf")] * setup.num_ingresses
        self._outcome = Outcome()
        for name, replica in zip(self._names, self._replicas, strict=True):
            for balancer in self._balancers:
                balancer.add_replica(name, BLOCK_SIZE, replica.load(0.0, ()))

    def run(self, arrivals: list[Arrival]) -> Outcome:
        """Serve all arrivals to their last token."""
        self._arrivals = arrivals
        for key, arrival in enumerate(arrivals):
            self._advance(arrival.time_s)
            self._now = arrival.time_s
            self._arrive(key, arrival)
        self._advance(float("inf"))
        self._outcome.busy_s = [replica.busy_s for replica in self._replicas]
        self._outcome.end_s = self._now
        return self._outcome

    def _clock(self) -> float:
        return self._now

    def _advance(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self._now, _, event = heapq.heappop(self._events)
            event()

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _arrive(self, key: int, arrival: Arrival) -> None:
        request = arrival.request
        cost = RequestCost(request.input_length, _EXPECTED_OUTPUT_TOKENS, 1, arrival.chain, BLOCK_SIZE)
        ingress = key % self._setup.num_ingresses
        balancer = self._balancers[ingress]
        began = time.thread_time()
        placement = balancer.book(key, cost)
        self._outcome.decision_us.append((time.thread_time() - began) * 1e6)
        if placement.replica_id is not None:
            self._start(key, ingress, placement.replica_id)
        elif placement.held:
            self._set_timer(ingress)

    def _dispatch(self, ingress: int) -> None:
        """Place what is held, as far as a replica has come free."""
        self._timer_at[ingress] = float("inf")
        balancer = self._balancers[ingress]
        began = time.thread_time()
        placed = balancer.dispatch()
        self._outcome.dispatch_us += (time.thread_time() - began) * 1e6
        for key in placed:
            replica_id = balancer.replica_of(key)
            assert replica_id is not None, "no replica ever leaves"
            self._start(key, ingress, replica_id)
        self._set_timer(ingress)

    def _set_timer(self, ingress: int) -> None:
        delay_s = self._balancers[ingress].next_dispatch_s()
        if delay_s is not None and self._now + delay_s < self._timer_at[ingress]:
            at = self._timer_at[ingress] = self._now + max(delay_s, 1e-6)
            self._at(at, lambda: self._dispatch(ingress) if self._timer_at[ingress] == at else None)

    def _start(self, key: int, ingress: int, replica_id: str) -> None:
        """A placed request reaches its replica."""
        arrival = self._arrivals[key]
        balancer = self._balancers[ingress]
        replica = self._replicas[self._index_of[replica_id]]
        receipt = balancer.receipt(key)
        ttft_s = 0.0

        def first_token() -> None:
            nonlocal ttft_s
            ttft_s = self._now - arrival.time_s
            balancer.computed(key)
            if self._setup.model.times_vary:
                self._tell(replica_id, replica, (), [], [])

        def last_token(tpot_s: float) -> None:
            self._outcome.ttft_s.append(ttft_s)
            self._outcome.tpot_s.append(tpot_s)
            balancer.release(key)
            self._tell(replica_id, replica, (), [], [])

        admission = replica.admit(arrival, self._now, Progress(first_token, last_token))
        outcome = self._outcome
        outcome.cached_tokens += admission.cached_tokens
        outcome.prompt_tokens += arrival.request.input_length
        outcome.misjudged_requests += receipt is None or receipt.cached_tokens != admission.cached_tokens
        self._tell(replica_id, replica, (key,), admission.stored, admission.removed)

    def _tell(
        self,
        replica_id: str,
        replica: Replica,
        admitted: tuple[int, ...],
        stored: list[int],
        removed: list[int],
    ) -> None:
        """A replica's state goes to all ingresses."""
        load = replica.load(self._now, admitted)
        staleness_s = self._setup.staleness_s

        def hear() -> None:
            for balancer in self._balancers:
                balancer.blocks_changed(replica_id, stored, removed)
                balancer.report(replica_id, load, staleness_s)

        if staleness_s:
            self._at(self._now + staleness_s, hear)
        else:
            hear()
