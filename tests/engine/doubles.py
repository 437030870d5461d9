"""A device that checks the engine instead of computing: shared by tests of the scheduler and the engines."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.execution.executor import Executor
from engine.execution.sample_rows import stays_on_device
from engine.memory import KVCacheManager
from engine.model_config import ModelConfig
from engine.preemption import SwapCost
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling import (
    BeamCandidate,
    BeamCandidates,
    SampledToken,
    SampleRequest,
    SamplerOutput,
    SchedulerOutput,
)
from engine.sequence import PLACEHOLDER

VOCAB_SIZE = 1000
EOS = 7
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=4096,
    eos_token_ids=(EOS,),
    fingerprint="checking",
)


def next_token(token_ids: list[int], sample_index: int) -> int:
    """What the checking device draws after `token_ids`: a function of the whole sequence."""
    digest = hashlib.blake2b(repr((token_ids, sample_index)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def expected_tokens(prompt: list[int], params: SamplingParams, index: int = 0) -> list[int]:
    """A request's output on an engine of its own, computed without one."""
    assert params.max_tokens is not None
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        tokens.append(next_token(tokens, index))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


class CheckingExecutor(Executor):
    """Keeps, for each physical slot, the token and position last written there.

    Each step it writes what it is told to, after the copies, then reads every sequence back through its block table
    and draws from what it read: a block that was shared, copied, evicted or reused wrongly gives a wrong token or
    fails at once. Also holds the step's budget and blocks to their bounds.
    """

    def __init__(self, cache: CacheConfig, config: EngineConfig, step_s: float = 0.0) -> None:
        self._block_size = cache.block_size
        self._config = config
        self._step_s = step_s
        # [slot within pool: block, offset; what: token, position]
        self._pool = np.full((cache.num_blocks, cache.block_size, 2), -1, dtype=np.int64)
        self._host = np.full((cache.num_swap_blocks, cache.block_size, 2), -1, dtype=np.int64)
        self.swap_seconds_per_block = 1e-4
        self.num_computed_tokens = 0
        self.largest_batch = 0

    def swap_cost(self) -> SwapCost:
        rate = 1.0 / self.swap_seconds_per_block
        return SwapCost(1, rate, rate)

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        time.sleep(self._step_s)
        assert output.num_tokens <= self._config.max_num_batched_tokens
        assert len(output.scheduled) <= self._config.max_num_seqs
        assert len({item.seq_id for item in output.scheduled}) == len(output.scheduled)
        self.num_computed_tokens += output.num_tokens
        self.largest_batch = max(self.largest_batch, len(output.scheduled))
        assert not (output.blocks_to_swap_out and output.blocks_to_swap_in)
        for copy in output.blocks_to_swap_out:
            self._host[copy.destination] = self._pool[copy.source]
        for copy in output.blocks_to_swap_in:
            self._pool[copy.destination] = self._host[copy.source]
            self._host[copy.source] = -1
        for copy in output.blocks_to_copy:
            self._pool[copy.destination] = self._pool[copy.source]
        written: set[tuple[int, int]] = set()
        for item in output.scheduled:
            for position, token in enumerate(item.token_ids.tolist(), start=item.start):
                slot = int(item.block_table[position // self._block_size]), position % self._block_size
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self._pool[slot] = token, position
        return self._draw(output)

    def _draw(self, output: SchedulerOutput) -> SamplerOutput:
        tokens: list[SampledToken] = []
        beams: dict[str, list[BeamCandidate]] = {}
        for item in output.scheduled:
            for sample in item.samples:
                read = self._read(item.block_table, sample)
                params = sample.sampling_params
                if params.use_beam_search:
                    beams.setdefault(sample.request_id, []).extend(
                        BeamCandidate(sample.seq_id, token, logprob, sample.cumulative_logprob + logprob, ())
                        for token, logprob in next_candidates(read)
                    )
                else:
                    token = next_token(read, sample.sample_index)
                    logprob = -1.0 - token / VOCAB_SIZE if params.ranks_at_end else float("nan")
                    tokens.append(SampledToken(sample.seq_id, token, logprob, ()))
        for candidates in beams.values():
            candidates.sort(key=lambda item: -item.cumulative_logprob)
        return SamplerOutput(
            tuple(tokens), tuple(BeamCandidates(request_id, tuple(items)) for request_id, items in beams.items())
        )

    def _read(self, block_table: np.ndarray, sample: SampleRequest) -> list[int]:
        slots = self._pool[block_table].reshape(-1, 2)[: sample.position]
        assert slots[:, 1].tolist() == list(range(sample.position)), "a slot holds another position than it should"
        read: list[int] = slots[:, 0].tolist()
        assert read == sample.token_ids.tolist(), "the cache does not hold this sequence"
        return read


class CheckingDevice(CheckingExecutor):
    """A CheckingExecutor beside the host, which computes a step when it is waited for and not before.

    Whatever the host changes or gives away between the submission of a step and its end, that the step still uses, so
    shows in its tokens.
    """

    overlaps = True

    def __init__(self, cache: CacheConfig, config: EngineConfig, step_s: float = 0.0) -> None:
        super().__init__(cache, config, step_s)
        self._steps: deque[CheckingStep] = deque()
        self._drawn: dict[int, int] = {}  # by the latest step that ran, by sequence
        self.num_ahead = 0  # steps submitted while another was in flight
        self.block_is_free: Callable[[int], bool] = set[int]().__contains__

    def submit(self, output: SchedulerOutput) -> CheckingStep:
        assert len(self._steps) < 2, "a step is scheduled ahead of one other"
        self.num_ahead += len(self._steps)
        self._steps.append(CheckingStep(self, _copied(output)))
        return self._steps[-1]

    def run(self, step: CheckingStep) -> SamplerOutput:
        assert self._steps.popleft() is step, "steps are collected in the order of their submission"
        for item in step.output.scheduled:
            assert not any(self.block_is_free(block) for block in item.block_table.tolist()), "a block in use is free"
        drawn = self.execute(self._with_known_tokens(step.output))
        self._drawn = {
            request.seq_id: token.token_id
            for token, request in zip(
                drawn.tokens,
                (r for item in step.output.scheduled for r in item.samples if not r.sampling_params.use_beam_search),
                strict=True,
            )
            if stays_on_device(request)
        }
        return drawn

    def _with_known_tokens(self, output: SchedulerOutput) -> SchedulerOutput:
        for item in output.scheduled:
            for seq_id, tokens in ((item.seq_id, item.token_ids), *((r.seq_id, r.token_ids) for r in item.samples)):
                assert PLACEHOLDER not in tokens[:-1], "only the last token can be in flight"
                if tokens[-1] == PLACEHOLDER:
                    tokens[-1] = self._drawn[seq_id]
        return output


class CheckingStep(NamedTuple):
    device: CheckingDevice
    output: SchedulerOutput

    def result(self) -> SamplerOutput:
        return self.device.run(self)


class BusyDevice(CheckingDevice):
    """A CheckingDevice that begins a step as soon as it can, on a thread of its own, and takes `step_s` for it."""

    def __init__(self, cache: CacheConfig, config: EngineConfig, step_s: float = 0.0) -> None:
        super().__init__(cache, config, step_s)
        self._thread = ThreadPoolExecutor(1)
        self._results: deque[Future[SamplerOutput]] = deque()

    def submit(self, output: SchedulerOutput) -> CheckingStep:
        step = super().submit(output)
        self._results.append(self._thread.submit(super().run, step))
        return step

    def run(self, _step: CheckingStep) -> SamplerOutput:
        return self._results.popleft().result()


def _copied(output: SchedulerOutput) -> SchedulerOutput:
    """What a device keeps of a step whose views the host goes on changing."""
    scheduled = tuple(
        item._replace(
            token_ids=item.token_ids.copy(),
            block_table=item.block_table.copy(),
            samples=tuple(sample._replace(token_ids=sample.token_ids.copy()) for sample in item.samples),
        )
        for item in output.scheduled
    )
    return dataclasses.replace(output, scheduled=scheduled)


def next_candidates(token_ids: list[int]) -> list[tuple[int, float]]:
    """Twelve continuations and their log-probabilities, most likely first; now and then one is the end."""
    digest = hashlib.blake2b(repr(token_ids).encode(), digest_size=60).digest()
    tokens = [EOS if digest[i] < 24 else 8 + digest[i] * 3 + i for i in range(12)]
    tokens = list(dict.fromkeys(tokens))
    # So many digits that the sums of two beams are never equal, whose order would be anyone's.
    digits = [int.from_bytes(digest[12 + 4 * i : 16 + 4 * i], "little") / 2**34 for i in range(12)]
    return [(token, -0.5 - 0.3 * i - digits[i]) for i, token in enumerate(tokens)]


def expected_beams(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """A beam search by brute force over the checking device's continuations: plain lists, no engine."""
    assert params.max_tokens is not None
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    while True:
        found = [
            (score + logprob, [*tokens, token])
            for score, tokens in live
            for token, logprob in next_candidates(prompt + tokens)
        ]
        found.sort(key=lambda item: -item[0])
        ends = [
            len(tokens) == params.max_tokens or (tokens[-1] == EOS and not params.ignore_eos) for _, tokens in found
        ]
        for (score, tokens), end in list(zip(found, ends, strict=True))[: params.width]:
            if end:
                finished.append((score / len(tokens) ** params.length_penalty, tokens))
        finished = sorted(finished, key=lambda item: -item[0])[: params.width]
        live = [item for item, end in zip(found, ends, strict=True) if not end][: params.width]
        if not live:
            break
        if len(finished) == params.width:
            patient = params.early_stopping == "never" and params.length_penalty > 0
            length = params.max_tokens if patient else len(live[0][1])
            if params.early_stopping is True or live[0][0] / length**params.length_penalty <= finished[-1][0]:
                break
    return [tokens for _, tokens in finished[: params.n]]


def make_engine(
    *, num_blocks: int = 64, step_s: float = 0.0, num_swap_blocks: int = 0, **options: object
) -> tuple[LLMEngine, CheckingExecutor]:
    """An engine over a CheckingExecutor. `options` are EngineConfig's."""
    config = EngineConfig.from_dict({"block_size": 4, "max_num_seqs": 16, **options, "num_blocks": num_blocks})
    cache = CacheConfig(config.block_size, num_blocks, config.prefix_caching, num_swap_blocks)
    executor = CheckingExecutor(cache, config, step_s)
    return LLMEngine(executor, MODEL, config, cache), executor


def make_async_engine(
    device: type[CheckingDevice] = CheckingDevice,
    *,
    num_blocks: int = 64,
    step_s: float = 0.0,
    num_swap_blocks: int = 0,
    **options: object,
) -> tuple[LLMEngine, CheckingDevice]:
    """An engine that schedules ahead, over a CheckingDevice. `options` are EngineConfig's."""
    config = EngineConfig.from_dict({"block_size": 4, "max_num_seqs": 16, **options, "num_blocks": num_blocks})
    cache = CacheConfig(config.block_size, num_blocks, config.prefix_caching, num_swap_blocks)
    executor = device(cache, config, step_s)
    engine = LLMEngine(executor, MODEL, config, cache)
    assert engine.schedules_ahead
    if isinstance(engine._kv_cache, KVCacheManager):
        executor.block_is_free = engine._kv_cache._pool.is_free
    return engine, executor


def make_request(request_id: str, prompt: list[int], **params: object) -> EngineRequest:
    defaults: dict[str, object] = {"max_tokens": 8, "ignore_eos": True}
    return EngineRequest(request_id, prompt, SamplingParams(**{**defaults, **params}))  # type: ignore[arg-type]


def run_to_end(engine: LLMEngine, max_steps: int = 100_000) -> dict[tuple[str, int], list[int]]:
    """Step until nothing is left, checking invariants; output tokens by (request id, index)."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests:
            engine.check_invariants()
            return tokens
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        engine.check_invariants()
    raise AssertionError(f"not finished after {max_steps} steps")
