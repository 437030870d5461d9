"""A simulated replica whose times are fixed: prompts in turn at one rate, tokens at one pace."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from app.transport.messages import LoadReport
from benchmarks.routing.cache import BlockCache
from benchmarks.routing.trace import BLOCK_SIZE, Arrival

# The fixed model says that decoding slows nothing; a rate of 0 would read as "not measured".
_NO_SLOWDOWN_S = 1e-12

# Has something happen at a time.
Schedule = Callable[[float, Callable[[], None]], None]


class Admission(NamedTuple):
    """What became of a request's prompt: how much of it was cached, and what it did to the cache."""

    cached_tokens: int
    stored: list[int]
    removed: list[int]


class Progress(NamedTuple):
    """What is called at the moment of a request's first token, and of its last, with seconds between two of them."""

    first_token: Callable[[], None]
    last_token: Callable[[float], None]


class Replica(Protocol):
    """What the simulation asks of a replica. `busy_s`: seconds that it has computed prompts or, in steps, anything."""

    busy_s: float

    def admit(self, arrival: Arrival, now: float, progress: Progress) -> Admission:
        """Take a request in."""
        ...

    def load(self, now: float, admitted: tuple[int, ...]) -> LoadReport:
        """What it would tell the ingresses."""
        ...


class Model(Protocol):
    """What replicas can do. `times_vary`: how long prompts take depends on more than their tokens, so that replicas
    must tell of their queues oftener.
    """

    @property
    def times_vary(self) -> bool: ...

    def make_replica(self, schedule: Schedule) -> Replica:
        """A replica that has nothing to do, and nothing cached."""
        ...


class ReplicaModel(NamedTuple):
    """What a replica can do: KV blocks, prompt tokens a second, and seconds between output tokens."""

    num_blocks: int
    prefill_tokens_per_s: float
    token_s: float

    @property
    def times_vary(self) -> bool:
        return False

    def make_replica(self, schedule: Schedule) -> SimulatedReplica:
        return SimulatedReplica(self, schedule)


class SimulatedReplica:
    """First come, first served. Blocks count as cached from the request's arrival on: whoever comes later is computed
    later, and finds them.
    """

    def __init__(self, model: ReplicaModel, schedule: Schedule) -> None:
        self.busy_s = 0.0
        self._model = model
        self._schedule = schedule
        self._cache = BlockCache(model.num_blocks)
        self._free_at = 0.0
        self._num_requests = 0
        self._running_tokens = 0

    def admit(self, arrival: Arrival, now: float, progress: Progress) -> Admission:
        """Take a request in."""
        request = arrival.request
        hits, stored, removed = self._cache.use(arrival.chain, now)
        cached_tokens = min(hits * BLOCK_SIZE, request.input_length - 1)
        prefill_s = (request.input_length - cached_tokens) / self._model.prefill_tokens_per_s
        self._free_at = max(self._free_at, now) + prefill_s
        self.busy_s += prefill_s
        self._num_requests += 1
        self._running_tokens += request.input_length

        def finish() -> None:
            self._num_requests -= 1
            self._running_tokens -= request.input_length
            progress.last_token(self._model.token_s)

        self._schedule(self._free_at, progress.first_token)
        self._schedule(self._free_at + request.output_length * self._model.token_s, finish)
        return Admission(cached_tokens, stored, removed)

    def load(self, now: float, admitted: tuple[int, ...]) -> LoadReport:
        """What it would tell the ingresses."""
        rate = self._model.prefill_tokens_per_s
        num_blocks = self._model.num_blocks
        return LoadReport(
            num_blocks=num_blocks,
            num_free_blocks=num_blocks,
            num_empty_blocks=num_blocks - len(self._cache),
            cache_age_s=self._cache.age_s(now),
            num_running=self._num_requests,
            num_waiting_tokens=round(max(self._free_at - now, 0.0) * rate),
            num_running_tokens=self._running_tokens,
            prefill_tokens_per_s=rate,
            decode_step_s=self._model.token_s,
            decode_sequence_s=_NO_SLOWDOWN_S,
            admitted=admitted,
        )
