"""The same in discrete events: the balancer's own code, replicas that compute in steps, and clients that come again."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from app.balancer import Balancer, RequestCost, RequestTerms
from app.balancer.admission_settings import AdmissionSettings
from app.balancer.terms import Refusal
from benchmarks.overload.report import Try
from benchmarks.overload.workload import Coming, jitter_s
from benchmarks.routing.replica import Progress
from benchmarks.routing.stepping import SteppingModel
from benchmarks.routing.trace import Arrival, TracedRequest

_NEVER_S = 1e9
_BLOCK_SIZE = 16


class Setup(NamedTuple):
    """The fleet and its clients.

    Attributes:
        staleness_s: from a change on a replica to its ingresses; promises go between ingresses every `news_s`.
        patience_s: who is told to wait longer does not come again.
        max_retries: of one request.
    """

    num_replicas: int
    num_ingresses: int
    model: SteppingModel
    seats: int
    settings: AdmissionSettings
    expected_output_tokens: int
    staleness_s: float = 0.005
    news_s: float = 0.5
    patience_s: float = 3600.0
    max_retries: int = 1
    hold_s: float | None = None


class Simulation:
    """Runs one list of requests."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self._setup = setup
        self._draw = random.Random(seed)
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = self._num_keys = self._num_open = 0
        self.tries: list[Try] = []
        self._by_key: dict[int, Try] = {}
        self._replicas = {f"r{index}": setup.model.make_replica(self._at) for index in range(setup.num_replicas)}
        for name, replica in self._replicas.items():
            replica.stepped = partial(self._tell, name)
        self.balancers = [
            Balancer(
                hold_s=setup.hold_s,
                admission=setup.settings,
                silent_after_s=_NEVER_S,
                stale_after_s=_NEVER_S,
                expire_after_s=_NEVER_S,
                clock=lambda: self._now,
                draw=random.Random(f"{seed} {index}"),
            )
            for index in range(setup.num_ingresses)
        ]
        self._has_timer = [False] * setup.num_ingresses
        for name, replica in self._replicas.items():
            for balancer in self.balancers:
                balancer.add_replica(name, _BLOCK_SIZE, replica.load(0.0, ()), setup.seats)
        self.most_waiting = 0

    def run(self, coming: Sequence[Coming], until_s: float = _NEVER_S) -> list[Try]:
        """Serve all of them, and those who come again by `until_s`."""
        for one in coming:
            self._at(one.due_s, lambda one=one: self._ask(one, 0))  # type: ignore[misc]
        if len(self.balancers) > 1:
            self._at(self._setup.news_s, self._exchange_news)
        while self._events and self._events[0][0] <= until_s:
            self._now, _, event = heapq.heappop(self._events)
            event()
        return self.tries

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (max(time_s, self._now), self._num_events, event))

    def _ask(self, coming: Coming, attempt: int) -> None:
        setup = self._setup
        asked = Try(coming, attempt, self._now)
        self.tries.append(asked)
        self._num_keys += 1
        key = self._num_keys
        self._by_key[key] = asked
        ingress = self._draw.randrange(setup.num_ingresses)
        balancer = self.balancers[ingress]
        entry = setup.settings.classes[setup.settings.default_class]
        terms = RequestTerms(
            setup.settings.default_class, entry.priority, entry.ttft_deadline_s, coming.tenant, coming.number + 1
        )
        expected = min(setup.expected_output_tokens, coming.output_tokens)
        placement = balancer.book(key, RequestCost(coming.prompt_tokens, expected, 1, (), _BLOCK_SIZE), (), terms)
        if placement.refusal is not None:
            self._refuse(key, placement.refusal)
        elif placement.replica_id is not None:
            self._start(key, ingress, placement.replica_id)
        self.most_waiting = max(self.most_waiting, sum(one.num_held for one in self.balancers))
        self._watch(ingress)

    def _refuse(self, key: int, refusal: Refusal) -> None:
        asked = self._by_key.pop(key)
        asked.retry_after_s = refusal.retry_after_s
        if asked.attempt < self._setup.max_retries and refusal.retry_after_s <= self._setup.patience_s:
            at_s = self._now + refusal.retry_after_s + jitter_s(self._draw, refusal.retry_after_s)
            self._at(at_s, lambda: self._ask(asked.coming, asked.attempt + 1))

    def _watch(self, ingress: int) -> None:
        delay_s = self.balancers[ingress].next_dispatch_s()
        if delay_s is not None and not self._has_timer[ingress]:
            self._has_timer[ingress] = True
            # As app/ingress/held_requests.py.
            self._at(self._now + min(max(delay_s, 0.001), 0.02), lambda: self._dispatch(ingress))

    def _dispatch(self, ingress: int) -> None:
        self._has_timer[ingress] = False
        balancer = self.balancers[ingress]
        for key in balancer.dispatch():
            replica_id = balancer.replica_of(key)
            assert replica_id is not None, "no replica ever leaves"
            self._start(key, ingress, replica_id)
        for key, refusal in balancer.take_refused():
            balancer.release(key)
            self._refuse(key, refusal)
        self._watch(ingress)

    def _start(self, key: int, ingress: int, replica_id: str) -> None:
        asked, balancer, replica = self._by_key[key], self.balancers[ingress], self._replicas[replica_id]
        coming = asked.coming
        request = TracedRequest(0.0, coming.prompt_tokens, coming.output_tokens, ())
        # A block of the trace's that nobody else has: nothing is cached.
        arrival = Arrival(self._now, request, 0)

        def first_token() -> None:
            asked.ttft_s = self._now - asked.sent_s
            balancer.computed(key)

        def last_token(tpot_s: float) -> None:  # noqa: ARG001 - the end alone is asked for
            asked.end_s = self._now
            self._by_key.pop(key)
            balancer.release(key)

        replica.admit(arrival, self._now, Progress(first_token, last_token))
        self._tell(replica_id, ingress, key)

    def _tell(self, replica_id: str, ingress: int = -1, key: int = -1) -> None:
        """A request has come, which its ingress is told of, or a step has ended: all ingresses hear of the load."""
        load = self._replicas[replica_id].load(self._now, ())

        def hear() -> None:
            for index, balancer in enumerate(self.balancers):
                own = replace(load, admitted=(key,)) if index == ingress else load
                balancer.report(replica_id, own, self._setup.staleness_s)

        self._at(self._now + self._setup.staleness_s, hear)

    def _exchange_news(self) -> None:
        for balancer in self.balancers:
            news = balancer.take_promises()
            for other in self.balancers:
                if other is not balancer:
                    other.hear_promises(news)
        if self._events:
            self._at(self._now + self._setup.news_s, self._exchange_news)
