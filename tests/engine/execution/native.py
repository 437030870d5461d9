"""Native engines that tests hold by the hand: chosen weights and cache types, chosen batches, and all logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.config import CacheConfig, EngineConfig
from engine.execution.native_runner import NativeModelRunner
from engine.execution.native_samples import SAMPLE
from engine.execution.native_worker import NativeWorker
from engine.execution.torch_worker import TorchWorker
from engine.loading import Checkpoint, open_checkpoint
from engine.loading.stored_tensor import FloatArray
from engine.memory import BlockCopy
from engine.scheduling import ScheduledSequence, SchedulerOutput

EXACT: dict[str, Any] = {"dtype": "float32", "quantization": "none", "kv_cache_dtype": "float32"}


def native_runner(source: str, num_blocks: int = 64, num_swap_blocks: int = 0, **options: Any) -> NativeModelRunner:
    """The runner of a worker on one thread, unless `options` (EngineConfig's) say otherwise. Sequences may fill the
    pool, where the model has no table of positions."""
    checkpoint = open_checkpoint(source)
    config = EngineConfig.from_dict({"num_threads": 1, **options})
    model_config = checkpoint.model_config()
    if model_config.position_embedding == "rotary":
        model_config = dataclasses.replace(model_config, max_position_embeddings=num_blocks * config.block_size)
    worker = NativeWorker(checkpoint, model_config, config)
    cache = CacheConfig(config.block_size, num_blocks, False, num_swap_blocks)
    worker.build_cache(cache, num_blocks * config.block_size)
    runner = worker._runner
    assert isinstance(runner, NativeModelRunner)
    return runner


def torch_logits(source: str | Checkpoint, token_ids: Sequence[int], **options: Any) -> FloatArray:
    """All rows' logits by torch, in float32 unless `options` say otherwise."""
    checkpoint = open_checkpoint(source) if isinstance(source, str) else source
    config = EngineConfig.from_dict({"num_threads": 1, "dtype": "float32", "kernels": "reference", **options})
    before = torch.get_num_threads()
    worker = TorchWorker(checkpoint, checkpoint.model_config(), config)
    torch.set_num_threads(before)
    worker.build_cache(CacheConfig(config.block_size, 64, False), 64 * config.block_size)
    assert worker._runner is not None
    return worker._runner.logits(np.array(token_ids, dtype=np.int32))


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Chunk(NamedTuple):
    """Tokens that a step appends to one sequence."""

    seq: int
    token_ids: Sequence[int]


class NativeSteps:
    """Sequences in a runner's cache, on blocks in random order of a pool that starts as garbage."""

    def __init__(self, runner: NativeModelRunner, num_seqs: int, max_len: int, seed: int = 0) -> None:
        self.runner = runner
        self._block_size = runner._block_size
        pool = runner._cache.kv_pool
        pool.fill(0xFF)  # NaN in every type of cache, int8's scales included
        self._rng = np.random.default_rng(seed)
        needed = -(-max_len // self._block_size)
        blocks = self._rng.permutation(len(pool))[: num_seqs * needed].astype(np.int32)
        self._tables = blocks.reshape(num_seqs, needed)
        self.lengths = [0] * num_seqs

    def step(self, chunks: Sequence[Chunk]) -> list[FloatArray]:
        """One step; the logits of all rows of each chunk."""
        scheduled = []
        for seq, token_ids in chunks:
            start = self.lengths[seq]
            self.lengths[seq] += len(token_ids)
            table = self._tables[seq, : -(-self.lengths[seq] // self._block_size)]
            scheduled.append(ScheduledSequence(seq, start, np.array(token_ids, dtype=np.int32), table, ()))
        return self._logits(SchedulerOutput(tuple(scheduled)))

    def swap_out_and_in(self, seq: int) -> None:
        """Move a sequence to the swap pool and back to other blocks, what it leaves behind becoming garbage."""
        cache = self.runner._cache
        table = self._tables[seq, : -(-self.lengths[seq] // self._block_size)]
        host = self._rng.permutation(len(cache.swap_pool))[: len(table)].tolist()
        copies = list(zip(table.tolist(), host, strict=True))
        self.runner.run(SchedulerOutput((), blocks_to_swap_out=tuple(BlockCopy(*copy) for copy in copies)))
        cache.kv_pool[table] = 0xFF
        free = np.setdiff1d(np.arange(len(cache.kv_pool)), self._tables)
        self._tables[seq, : len(table)] = self._rng.permutation(free)[: len(table)]
        back = zip(host, self._tables[seq, : len(table)].tolist(), strict=True)
        self.runner.run(SchedulerOutput((), blocks_to_swap_in=tuple(BlockCopy(*copy) for copy in back)))

    def forget(self, seq: int) -> None:
        """Preempted for recomputation: nothing of it is left."""
        self.runner._cache.kv_pool[self._tables[seq]] = 0xFF
        self.lengths[seq] = 0

    def _logits(self, output: SchedulerOutput) -> list[FloatArray]:
        num_rows = output.num_tokens
        logits = np.empty((num_rows, self.runner._model.vocab_size), dtype=np.float32)
        samples = np.zeros(num_rows, dtype=SAMPLE)
        samples["row"], samples["top_p"] = np.arange(num_rows), 1.0
        samples["logits"] = logits.ctypes.data + np.arange(num_rows) * logits.strides[0]
        self.runner._fill(output)
        self.runner._step(np.arange(num_rows, dtype=np.int32), samples)
        ends = np.cumsum([len(item.token_ids) for item in output.scheduled])
        return np.split(logits, ends[:-1])


def alone(runner: NativeModelRunner, token_ids: Sequence[int]) -> FloatArray:
    """Logits of every position of one sequence, in one step and with the pool to itself."""
    return NativeSteps(runner, 1, len(token_ids)).step([Chunk(0, token_ids)])[0]
