"""Drives an engine with a trace: requests arrive when they arrive, however busy the engine is (an open loop)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.paper.traces import FloatArray, TraceRequest
from engine.engine import LLMEngine
from engine.execution.simulated import Clock
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

# Steps between two looks at whether a replay has already missed its latency bound.
_CHECK_EVERY = 128


@dataclass
class Replay:
    """How a replay went.

    Attributes:
        normalized_latencies: seconds from arrival to the last token, by output length, of each finished request; for
            several sequences a request, the mean length of one.
        duration_s: from the first arrival's clock zero to the last token.
        exceeded: the replay was cut short since its mean normalized latency could only end above the bound.
    """

    normalized_latencies: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    num_steps: int = 0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    exceeded: bool = False

    @property
    def mean_normalized_latency(self) -> float:
        return float(np.mean(self.normalized_latencies)) if self.normalized_latencies else float("inf")

    @property
    def latencies(self) -> FloatArray:
        return np.array(self.normalized_latencies)


class _Outstanding:
    """Requests that are not answered yet."""

    def __init__(self, trace: list[TraceRequest]) -> None:
        self._requests = {str(index): request for index, request in enumerate(trace)}
        self._num_requests = len(trace)
        self._finished_sum = 0.0

    def finish(self, request_id: str, now: float) -> float:
        request = self._requests.pop(request_id)
        latency = (now - request.arrival_s) / request.num_output_tokens
        self._finished_sum += latency
        return latency

    def must_exceed(self, bound: float, now: float) -> bool:
        """Whether the mean over all requests ends above `bound` even if all were answered now."""
        waited = sum(max(0.0, now - item.arrival_s) / item.num_output_tokens for item in self._requests.values())
        return self._finished_sum + waited > bound * self._num_requests


def replay(
    engine: LLMEngine,
    clock: Clock,
    trace: list[TraceRequest],
    sampling: Callable[[TraceRequest], SamplingParams],
    *,
    seed: int = 0,
    bound: float = float("inf"),
    observe: Iterable[Callable[[float, float], None]] = (),
) -> Replay:
    """Run a whole trace, until its last request is answered or the mean normalized latency must exceed `bound`.

    Args:
        clock: the engine's own: virtual for a simulated device, real for a real one. Arrivals count from its now.
        sampling: the sampling parameters of a request of the trace.
        observe: called after each step with when it began and when it ended, seconds since the replay did.
    """
    result = Replay()
    outstanding = _Outstanding(trace)
    prompts = PromptMaker(engine.model_config.vocab_size, seed)
    observers = tuple(observe)
    begin = clock.now()
    arrived = 0
    while arrived < len(trace) or engine.has_unfinished_requests:
        now = clock.now() - begin
        if not engine.has_unfinished_requests and trace[arrived].arrival_s > now:
            clock.advance(trace[arrived].arrival_s - now)
            now = clock.now() - begin
        # The idle wait may end a rounding error early: the request it waited for is due all the same.
        while arrived < len(trace) and (trace[arrived].arrival_s <= now or not engine.has_unfinished_requests):
            request = trace[arrived]
            engine.add_request(
                EngineRequest(str(arrived), prompts.make(request), sampling(request), arrival_time=request.arrival_s)
            )
            arrived += 1
        outputs = engine.step()
        end = clock.now() - begin
        result.num_steps += 1
        for output in outputs:
            result.num_output_tokens += len(output.token_ids)
            if output.request_finished:
                result.normalized_latencies.append(outstanding.finish(output.request_id, end))
        for observer in observers:
            observer(now, end)
        if result.num_steps % _CHECK_EVERY == 0 and outstanding.must_exceed(bound, end):
            result.exceeded = True
            break
    result.duration_s = clock.now() - begin
    result.num_preemptions = engine.stats().num_preemptions
    return result


class PromptMaker:
    """Prompts of random tokens from a fixed seed, all with one shared prefix."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._rng = np.random.default_rng((seed, 3))
        self._vocab_size = vocab_size
        self._seed = seed

    def make(self, request: TraceRequest) -> list[int]:
        num_own = request.num_prompt_tokens - request.num_shared
        own: list[int] = self._rng.integers(0, self._vocab_size, num_own).tolist()
        return [*shared_prefix(self._vocab_size, self._seed, request.num_shared), *own]


@functools.lru_cache(maxsize=4)
def shared_prefix(vocab_size: int, seed: int, length: int) -> tuple[int, ...]:
    """The prefix of that length in all prompts of a replay with that seed."""
    tokens: list[int] = np.random.default_rng((seed, 4)).integers(0, vocab_size, length).tolist()
    return tuple(tokens)
