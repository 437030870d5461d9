"""Runs steps in eager torch: on a GPU, and on a CPU as the reference."""

from __future__ import annotations

import numpy as np
import torch

from engine.config import EngineConfig
from engine.decoding.sampler import Sampler
from engine.errors import ConfigError
from engine.execution.cache_engine import CacheEngine
from engine.execution.input_batch import InputBatch
from engine.execution.sample_rows import sample_rows
from engine.int32_buffer import Int32Array
from engine.loading.stored_tensor import FloatArray
from engine.model_config import ModelConfig
from engine.models import CausalLM
from engine.scheduling import SamplerOutput, ScheduledSequence, SchedulerOutput


class TorchModelRunner:
    """A ModelRunner over a CausalLM.

    Args:
        max_blocks: blocks of one sequence.
        draws: whether tokens are drawn here: on one rank of several.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: CacheEngine,
        model_config: ModelConfig,
        config: EngineConfig,
        max_blocks: int,
        draws: bool = True,
    ) -> None:
        self._draws = draws
        self._model = model
        self._cache = cache
        self._sampler = Sampler(model_config.eos_token_ids)
        device = cache.kv_pool.device
        self._max_tokens, self._max_blocks = config.max_num_batched_tokens, min(max_blocks, len(cache.kv_pool))
        self._block_size = config.block_size
        max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._inputs = InputBatch(config.max_num_batched_tokens, max_seqs, max_blocks, config.block_size, device)

    @torch.inference_mode()
    def run(self, output: SchedulerOutput) -> SamplerOutput:
        self._cache.swap_out(output.blocks_to_swap_out)
        self._cache.swap_in(output.blocks_to_swap_in)
        self._cache.copy(output.blocks_to_copy)
        if not output.scheduled:
            return SamplerOutput()
        token_ids, metadata = self._inputs.fill(output)
        hidden = self._model.forward(token_ids, self._cache.kv_pool, metadata)
        batch_rows, requests, logits_rows = sample_rows(output)
        if not requests:
            return SamplerOutput()
        logits = self._model.compute_logits(hidden[torch.tensor(batch_rows, device=hidden.device)])
        if not self._draws:
            return SamplerOutput()
        return self._sampler.sample(logits.cpu().numpy(), requests, logits_rows)

    @torch.inference_mode()
    def logits(self, token_ids: Int32Array) -> FloatArray:
        num_blocks = -(-len(token_ids) // self._block_size)
        if num_blocks > self._max_blocks:
            raise ConfigError(f"{len(token_ids)} tokens need {num_blocks} KV blocks, a sequence has {self._max_blocks}")
        block_table = np.arange(num_blocks, dtype=np.int32)
        rows = []
        for start in range(0, len(token_ids), self._max_tokens):
            chunk = ScheduledSequence(0, start, token_ids[start : start + self._max_tokens], block_table, ())
            input_ids, metadata = self._inputs.fill(SchedulerOutput((chunk,)))
            hidden = self._model.forward(input_ids, self._cache.kv_pool, metadata)
            rows.append(self._model.compute_logits(hidden).float().cpu().numpy())
        return np.concatenate(rows)
