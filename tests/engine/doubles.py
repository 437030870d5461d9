"""A device that checks the engine instead of computing: shared by tests of the scheduler and the engines."""

from __future__ import annotations

import hashlib
import time

import numpy as np

from engine.config import CacheConfig, EngineConfig, ModelConfig
from engine.engine import LLMEngine
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling import SampledToken, SampleRequest, SchedulerOutput

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


class CheckingExecutor:
    """Keeps, for each physical slot, the token and position last written there.

    Each step it writes what it is told to, after the copies, then reads every sequence back through its block table
    and draws from what it read: a block that was shared, copied, evicted or reused wrongly gives a wrong token or
    fails at once. Also holds the step's budget and blocks to their bounds.
    """

    def __init__(self, cache: CacheConfig, config: EngineConfig, step_s: float = 0.0) -> None:
        self._block_size = cache.block_size
        self._config = config
        self._step_s = step_s
        self._tokens = np.full((cache.num_blocks, cache.block_size), -1, dtype=np.int64)
        self._positions = np.full((cache.num_blocks, cache.block_size), -1, dtype=np.int64)
        self.num_computed_tokens = 0
        self.largest_batch = 0

    def execute(self, output: SchedulerOutput) -> list[SampledToken]:
        time.sleep(self._step_s)
        assert output.num_tokens <= self._config.max_num_batched_tokens
        assert len(output.scheduled) <= self._config.max_num_seqs
        assert len({item.seq_id for item in output.scheduled}) == len(output.scheduled)
        self.num_computed_tokens += output.num_tokens
        self.largest_batch = max(self.largest_batch, len(output.scheduled))
        for copy in output.blocks_to_copy:
            self._tokens[copy.destination] = self._tokens[copy.source]
            self._positions[copy.destination] = self._positions[copy.source]
        written: set[tuple[int, int]] = set()
        for item in output.scheduled:
            for position, token in enumerate(item.token_ids.tolist(), start=item.start):
                slot = int(item.block_table[position // self._block_size]), position % self._block_size
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self._tokens[slot], self._positions[slot] = token, position
        return [token for item in output.scheduled for token in self._draw(item.block_table, item.samples)]

    def _draw(self, block_table: np.ndarray, samples: tuple[SampleRequest, ...]) -> list[SampledToken]:
        drawn = []
        for sample in samples:
            read = self._tokens[block_table].reshape(-1)[: sample.position].tolist()
            positions = self._positions[block_table].reshape(-1)[: sample.position].tolist()
            assert positions == list(range(sample.position)), "a slot holds another position than it should"
            assert read == sample.token_ids.tolist(), "the cache does not hold this sequence"
            drawn.append(SampledToken(sample.seq_id, next_token(read, sample.sample_index), float("nan"), ()))
        return drawn


def make_engine(*, num_blocks: int = 64, step_s: float = 0.0, **options: object) -> tuple[LLMEngine, CheckingExecutor]:
    """An engine over a CheckingExecutor. `options` are EngineConfig's."""
    config = EngineConfig.from_dict({"block_size": 4, "max_num_seqs": 16, **options, "num_blocks": num_blocks})
    cache = CacheConfig(config.block_size, num_blocks, config.prefix_caching)
    executor = CheckingExecutor(cache, config, step_s)
    return LLMEngine(executor, MODEL, config, cache), executor


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
