"""A simulated replica that computes in steps, as the engine does: decodes and a chunk of the prompts share each.

A step lasts what the engine's step-time model says of the hardware (engine/execution/simulated_step_time.py), so output
tokens come the slower the more sequences decode, the longer their contexts and the more prompt is computed beside them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from app.transport.messages import LoadReport
from benchmarks.routing.cache import BlockCache
from benchmarks.routing.replica import Admission, Progress, Schedule
from benchmarks.routing.trace import BLOCK_SIZE, Arrival
from engine.execution.simulated_step_time import StepTimeModel, StepWork

# The batch at which a replica tells what a sequence costs: that of a replica in use.
_MANY = 32


class SteppingModel(NamedTuple):
    """What a replica can do: KV blocks, its hardware's step times, and the engine's bounds on a step."""

    num_blocks: int
    steps: StepTimeModel
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256

    @property
    def times_vary(self) -> bool:
        return True

    def make_replica(self, schedule: Schedule) -> SteppingReplica:
        return SteppingReplica(self, schedule)


@dataclass(slots=True)
class _Prompt:
    """A prompt that is computed up to `num_computed`; `num_tokens` includes what was cached."""

    num_tokens: int
    num_computed: int
    output_length: int
    progress: Progress
    taken_in: bool = False


class SteppingReplica:
    """First come, first served, decodes first. Blocks are cached and dropped as SimulatedReplica's: what sequences that
    run need of the memory is not reckoned with.

    Attributes:
        stepped: called at the end of each step, before the next begins.
        num_steps: that have ended.
        is_stepping: whether one runs.
    """

    def __init__(self, model: SteppingModel, schedule: Schedule) -> None:
        self.busy_s = 0.0
        self._model = model
        self._schedule = schedule
        self._cache = BlockCache(model.num_blocks)
        self._prompts: deque[_Prompt] = deque()
        self._waiting_tokens = 0
        self._running_tokens = 0
        # Sequences that decode: how many, their tokens, and each with the number of the step that gives its last.
        self._num_decoding = 0
        self._context_tokens = 0
        self._endings: list[tuple[int, int, int, Callable[[float], None]]] = []
        self.num_steps = 0
        self.stepped: Callable[[], None] | None = None
        self.is_stepping = False
        self._num_admitted = 0
        budget = model.max_num_batched_tokens
        self._prefill_rate = budget / model.steps.seconds(_prompt_work(1, budget, 0))

    def admit(self, arrival: Arrival, now: float, progress: Progress) -> Admission:
        """Take a request in; it can take part in the step after the one that runs."""
        request = arrival.request
        hits, stored, removed = self._cache.use(arrival.chain, now)
        cached_tokens = min(hits * BLOCK_SIZE, request.input_length - 1)
        self._prompts.append(_Prompt(request.input_length, cached_tokens, request.output_length, progress))
        self._waiting_tokens += request.input_length - cached_tokens
        self._running_tokens += request.input_length
        if not self.is_stepping:
            self._step(now)
        return Admission(cached_tokens, stored, removed)

    def load(self, now: float, admitted: tuple[int, ...]) -> LoadReport:
        """What it would tell the ingresses."""
        num_blocks = self._model.num_blocks
        step_s, sequence_s = self._decode_rates()
        return LoadReport(
            num_blocks=num_blocks,
            num_free_blocks=num_blocks,
            num_empty_blocks=num_blocks - len(self._cache),
            cache_age_s=self._cache.age_s(now),
            num_waiting=len(self._prompts),
            num_running=self._num_decoding,
            num_waiting_tokens=self._waiting_tokens,
            num_running_tokens=self._running_tokens,
            prefill_tokens_per_s=self._prefill_rate,
            decode_step_s=step_s,
            decode_sequence_s=sequence_s,
            admitted=admitted,
        )

    def told_load(self, now: float) -> LoadReport:
        """As `load`, without the requests that no step has taken in yet: an engine counts them from then on."""
        unseen = [prompt for prompt in self._prompts if not prompt.taken_in]
        load = self.load(now, ())
        return replace(
            load,
            num_waiting=load.num_waiting - len(unseen),
            num_waiting_tokens=load.num_waiting_tokens - sum(one.num_tokens - one.num_computed for one in unseen),
        )

    def _decode_rates(self) -> tuple[float, float]:
        """Seconds of a decode step, and what one more sequence of the present length adds to it."""
        context = self._model.max_num_batched_tokens
        if self._num_decoding:
            context = self._context_tokens // self._num_decoding
        seconds = self._model.steps.seconds
        one, many = (seconds(_decode_work(count, count * context)) for count in (1, _MANY))
        return one, max((many - one) / (_MANY - 1), 1e-12)

    def _step(self, now: float) -> None:
        """Begin a step with all who decode and as much of the prompts as the budget leaves."""
        work = _decode_work(self._num_decoding, self._context_tokens)
        budget = self._model.max_num_batched_tokens - self._num_decoding
        room = self._model.max_num_seqs - self._num_decoding
        num_prompt_tokens = 0
        computed: list[_Prompt] = []
        for prompt in self._prompts:
            prompt.taken_in = True
        for prompt in self._prompts:
            if budget <= 0 or room <= 0:
                break
            chunk = min(prompt.num_tokens - prompt.num_computed, budget)
            is_last = prompt.num_computed + chunk == prompt.num_tokens
            more = _prompt_work(1, chunk, prompt.num_computed, num_samples=int(is_last))
            work = StepWork(*(left + right for left, right in zip(work, more, strict=True)))
            prompt.num_computed += chunk
            num_prompt_tokens += chunk
            budget -= chunk
            room -= 1
            if is_last:
                computed.append(prompt)
        if not work.num_tokens:
            self.is_stepping = False
            return
        self.is_stepping = True
        lasts_s = self._model.steps.seconds(work)
        if num_prompt_tokens == self._model.max_num_batched_tokens - self._num_decoding:
            # A step full of prompt is a measurement of the rate, as the engine takes it.
            self._prefill_rate += 0.1 * (num_prompt_tokens / lasts_s - self._prefill_rate)
        self.busy_s += lasts_s
        self._schedule(now + lasts_s, lambda: self._end_step(now + lasts_s, num_prompt_tokens, computed))

    def _end_step(self, now: float, num_prompt_tokens: int, computed: list[_Prompt]) -> None:
        self.num_steps += 1
        self._waiting_tokens -= num_prompt_tokens
        self._context_tokens += self._num_decoding
        for prompt in computed:
            assert self._prompts.popleft() is prompt, "prompts are computed in turn"
            self._begin_decoding(prompt, now)
        ended = []
        while self._endings and self._endings[0][0] <= self.num_steps:
            ended.append(heapq.heappop(self._endings))
        for _, _, num_tokens, _ in ended:
            self._num_decoding -= 1
            self._context_tokens -= num_tokens
        if self.stepped is not None:
            self.stepped()
        # The next step begins at once; what ends is told after it is known what runs on.
        self._step(now)
        for prompt in computed:
            prompt.progress.first_token()
        for _, _, _, last_token in ended:
            last_token(now)

    def _begin_decoding(self, prompt: _Prompt, began_at: float) -> None:
        """A prompt's first token has come: the others come one a step."""
        num_more = max(prompt.output_length - 1, 0)
        self._num_admitted += 1
        self._num_decoding += 1
        self._context_tokens += prompt.num_tokens

        def last_token(now: float) -> None:
            self._running_tokens -= prompt.num_tokens
            prompt.progress.last_token((now - began_at) / max(num_more, 1))

        ending = (self.num_steps + num_more, self._num_admitted, prompt.num_tokens + num_more, last_token)
        heapq.heappush(self._endings, ending)


def _decode_work(num_seqs: int, num_context_tokens: int) -> StepWork:
    """One token of each sequence, which sees itself and all before it."""
    num_visible = num_context_tokens + num_seqs
    return StepWork(num_seqs, num_seqs, num_seqs, num_visible, num_visible)


def _prompt_work(num_seqs: int, num_new: int, start: int, num_samples: int = 1) -> StepWork:
    """A prompt's tokens from `start` on."""
    pairs = num_new * start + num_new * (num_new + 1) // 2
    return StepWork(num_seqs, num_new, num_samples, start + num_new, pairs)
