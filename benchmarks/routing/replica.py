"""A simulated replica: prompts in turn at a fixed rate, blocks in an exact LRU cache, tokens at a fixed pace."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from app.transport.messages import LoadReport
from benchmarks.routing.trace import BLOCK_SIZE, Arrival

# The fixed model says that decoding slows nothing; a rate of 0 would read as "not measured".
_NO_SLOWDOWN_S = 1e-12


class ReplicaModel(NamedTuple):
    """What a replica can do: KV blocks, prompt tokens a second, and seconds between output tokens."""

    num_blocks: int
    prefill_tokens_per_s: float
    token_s: float


class Admission(NamedTuple):
    """What became of a request's prompt: times of its first and last token, and what it did to the cache."""

    first_token_s: float
    last_token_s: float
    cached_tokens: int
    stored: list[int]
    removed: list[int]


class SimulatedReplica:
    """First come, first served. Blocks count as cached from the request's arrival on: whoever comes later is computed
    later, and finds them.
    """

    def __init__(self, model: ReplicaModel) -> None:
        self.busy_s = 0.0
        self._model = model
        self._cache: OrderedDict[int, float] = OrderedDict()
        self._free_at = 0.0
        self._num_requests = 0
        self._running_tokens = 0

    def admit(self, arrival: Arrival, now: float) -> Admission:
        """Take a request in."""
        chain = arrival.chain
        cache = self._cache
        hits = next((index for index, block in enumerate(chain) if block not in cache), len(chain))
        request = arrival.request
        cached_tokens = min(hits * BLOCK_SIZE, request.input_length - 1)
        prefill_s = (request.input_length - cached_tokens) / self._model.prefill_tokens_per_s
        stored, removed = self._touch(chain, now)
        self._free_at = max(self._free_at, now) + prefill_s
        self.busy_s += prefill_s
        self._num_requests += 1
        self._running_tokens += request.input_length
        last_token_s = self._free_at + request.output_length * self._model.token_s
        return Admission(self._free_at, last_token_s, cached_tokens, stored, removed)

    def finish(self, arrival: Arrival) -> None:
        """A request has had its last token."""
        self._num_requests -= 1
        self._running_tokens -= arrival.request.input_length

    def load(self, now: float, admitted: tuple[int, ...]) -> LoadReport:
        """What it would tell the ingresses."""
        rate = self._model.prefill_tokens_per_s
        num_blocks = self._model.num_blocks
        return LoadReport(
            num_blocks=num_blocks,
            num_free_blocks=num_blocks,
            num_empty_blocks=num_blocks - len(self._cache),
            cache_age_s=now - next(iter(self._cache.values())) if self._cache else 0.0,
            num_running=self._num_requests,
            num_waiting_tokens=round(max(self._free_at - now, 0.0) * rate),
            num_running_tokens=self._running_tokens,
            prefill_tokens_per_s=rate,
            decode_step_s=self._model.token_s,
            decode_sequence_s=_NO_SLOWDOWN_S,
            admitted=admitted,
        )

    def _touch(self, chain: list[int], now: float) -> tuple[list[int], list[int]]:
        """Use a chain, its end first, so that the end is dropped before the beginning."""
        cache = self._cache
        stored = []
        for block in reversed(chain):
            if block in cache:
                cache.move_to_end(block)
            else:
                stored.append(block)
            cache[block] = now
        removed = [cache.popitem(last=False)[0] for _ in range(len(cache) - self._model.num_blocks)]
        return stored, removed
