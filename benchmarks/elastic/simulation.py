"""A fleet that grows and shrinks, in discrete events: replicas in steps, reports on their way, a policy's decisions.

For iterating on a policy in seconds; what it says is compared with real Serve in docs/benchmarks.md.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from app.autoscaling.report import Observation, ReplicaReport
from benchmarks.elastic.workload import ElasticRequest, Prices

# Serve's control loop, and how often replicas export (app.autoscaling.serve_options).
CONTROL_S = 0.1
EXPORT_S = 0.5


class Timing(NamedTuple):
    """Measured on real Serve: from a decision to a replica that takes requests, and from an export to the policy."""

    start_s: float = 4.0
    export_delay_s: float = 0.1


class Controller(Protocol):
    """Decides ten times a second."""

    def decide(self, seen: Observation) -> int:
        """The number of replicas to have."""
        ...


@dataclass(slots=True)
class _Sequence:
    request: ElasticRequest
    index: int
    prompt_left: int
    output_left: int


@dataclass(slots=True, eq=False)
class _Replica:
    """One engine: first come, first served; a step has all decodes and as much prompt as its budget allows."""

    name: str
    prices: Prices
    born_s: float
    ready_s: float
    draining: bool = False
    waiting: deque[_Sequence] = field(default_factory=deque)
    running: list[_Sequence] = field(default_factory=list)
    stepping: bool = False
    offered: list[float] = field(default_factory=lambda: [0.0] * 4)
    drawn: int = 0
    gone_s: float = math.inf

    @property
    def prompt_tokens(self) -> int:
        return sum(item.prompt_left for item in self.waiting) + sum(item.prompt_left for item in self.running)

    @property
    def num_open(self) -> int:
        return len(self.waiting) + len(self.running)

    def step(self) -> tuple[float, list[_Sequence], list[_Sequence]]:
        """Seconds of the next step, the sequences that draw their first token in it, and those that end."""
        decoding = [item for item in self.running if not item.prompt_left]
        tokens = len(decoding)
        first: list[_Sequence] = []
        for item in self.running:
            if item.prompt_left:
                tokens += self._compute(item, self.prices.step_tokens - tokens, first)
        while self.waiting and len(self.running) < self.prices.max_num_seqs and tokens < self.prices.step_tokens:
            item = self.waiting.popleft()
            self.running.append(item)
            tokens += self._compute(item, self.prices.step_tokens - tokens, first)
        for item in (*decoding, *first):
            item.output_left -= 1
            self.drawn += 1
        ended = [item for item in (*decoding, *first) if not item.output_left]
        self.running = [item for item in self.running if item.output_left]
        return max(self.prices.step_s, tokens / self.prices.prefill_tokens_per_s), first, ended

    def _compute(self, item: _Sequence, budget: int, first: list[_Sequence]) -> int:
        chunk = min(item.prompt_left, max(budget, 0))
        item.prompt_left -= chunk
        if not item.prompt_left:
            first.append(item)
        return chunk

    def report(self, capacity: float) -> ReplicaReport:
        return ReplicaReport(
            offered_requests=self.offered[0],
            offered_prompt_tokens=self.offered[1],
            offered_prompt_squares=self.offered[2],
            offered_output_tokens=self.offered[3],
            num_waiting=len(self.waiting),
            num_waiting_tokens=self.prompt_tokens,
            num_running=len(self.running),
            num_output_tokens=self.drawn,
            prompt_tokens_per_s=capacity,
            max_num_seqs=self.prices.max_num_seqs,
        )


@dataclass(slots=True)
class ElasticOutcome:
    """What a run was like.

    Attributes:
        ttft_s: by request, in the order of arrival.
        lives: (asked for, ready, gone) of each replica.
        replica_s: seconds that replicas were there: starting, running and draining.
    """

    ttft_s: list[float]
    lives: list[tuple[float, float, float]]

    @property
    def replica_s(self) -> float:
        return sum(gone - born for born, _, gone in self.lives)


class ElasticSimulation:
    """One controller under one load.

    Requests go to the replica with the least prompt to compute; while none is ready they wait. A replica that is to
    stop takes no more, and is gone with its last token; the newest goes first.
    """

    def __init__(
        self, prices: Prices, controller: Controller, timing: Timing | None = None, initial_replicas: int = 0
    ) -> None:
        self._prices = prices
        self._controller = controller
        self._timing = timing or Timing()
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_events = 0
        self._replicas: list[_Replica] = []
        self._lives: list[_Replica] = []
        self._reports: dict[str, ReplicaReport] = {}
        self._queue: deque[_Sequence] = deque()
        self._target = 0
        self._open = 0
        self._ttft: list[float] = []
        self._scale_to(initial_replicas, start_s=0.0)

    def run(self, requests: Sequence[ElasticRequest], end_s: float) -> ElasticOutcome:
        """Serve all requests, and then go on until `end_s` at least and until nothing is open."""
        self._ttft = [math.inf] * len(requests)
        for index, request in enumerate(requests):
            item = _Sequence(request, index, request.num_prompt, request.num_output)
            self._at(request.due_s, lambda item=item: self._arrive(item))  # type: ignore[misc]
        self._at(0.0, self._control)
        while self._events and (self._now < end_s or self._open):
            self._now, _, event = heapq.heappop(self._events)
            event()
        lives = [(item.born_s, item.ready_s, min(item.gone_s, self._now)) for item in self._lives]
        return ElasticOutcome(self._ttft, lives)

    def _at(self, time_s: float, event: Callable[[], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (time_s, self._num_events, event))

    def _control(self) -> None:
        ready = self._ready()
        seen = Observation(
            self._now,
            self._target,
            len(ready),
            {item.name: self._reports[item.name] for item in ready if item.name in self._reports},
            self._open,
        )
        # Serve's cold start, for requests that no replica has: the policy is not asked.
        cold = not ready and self._queue
        self._scale_to(max(self._target, 1) if cold else self._controller.decide(seen), self._timing.start_s)
        self._at(self._now + CONTROL_S, self._control)

    def _ready(self) -> list[_Replica]:
        return [item for item in self._replicas if not item.draining and item.ready_s <= self._now]

    def _scale_to(self, target: int, start_s: float) -> None:
        self._target = target
        live = [item for item in self._replicas if not item.draining]
        for _ in range(len(live), target):
            replica = _Replica(f"r{len(self._lives)}", self._prices, self._now, self._now + start_s)
            self._replicas.append(replica)
            self._lives.append(replica)
            self._at(replica.ready_s, lambda replica=replica: self._come_up(replica))  # type: ignore[misc]
        # Those that are not ready go first, then the newest.
        live.sort(key=lambda item: (item.ready_s <= self._now, -item.born_s))
        for replica in live[: max(len(live) - target, 0)]:
            replica.draining = True
            self._end_if_drained(replica)

    def _come_up(self, replica: _Replica) -> None:
        if replica.gone_s < math.inf:
            return
        while self._queue and not replica.draining:
            self._give(self._queue.popleft(), replica)
        self._export(replica)

    def _export(self, replica: _Replica) -> None:
        if replica.gone_s < math.inf:
            return
        report = replica.report(self._prices.prefill_tokens_per_s)

        def hear() -> None:
            self._reports[replica.name] = report

        self._at(self._now + self._timing.export_delay_s, hear)
        self._at(self._now + EXPORT_S, lambda: self._export(replica))

    def _arrive(self, item: _Sequence) -> None:
        self._open += 1
        ready = self._ready()
        for replica in ready:
            replica.offered[0] += 1.0 / len(ready)
            replica.offered[1] += item.request.num_prompt / len(ready)
            replica.offered[2] += item.request.num_prompt**2 / len(ready)
            replica.offered[3] += item.request.num_output / len(ready)
        if ready:
            self._give(item, min(ready, key=lambda replica: replica.prompt_tokens))
        else:
            self._queue.append(item)

    def _give(self, item: _Sequence, replica: _Replica) -> None:
        replica.waiting.append(item)
        if not replica.stepping:
            self._step(replica)

    def _step(self, replica: _Replica) -> None:
        replica.stepping = bool(replica.num_open)
        if not replica.stepping:
            self._end_if_drained(replica)
            return
        seconds, first, ended = replica.step()

        def done() -> None:
            for item in first:
                self._ttft[item.index] = self._now - item.request.due_s
            self._open -= len(ended)
            self._step(replica)

        self._at(self._now + seconds, done)

    def _end_if_drained(self, replica: _Replica) -> None:
        if replica.draining and not replica.num_open and not replica.stepping and replica.gone_s == math.inf:
            replica.gone_s = self._now
            self._replicas.remove(replica)
