"""Runs one step: SchedulerOutput in, drawn tokens out."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.config import EngineConfig
from engine.decoding.sampler import Sampler
from engine.execution.cache_engine import CacheEngine
from engine.execution.input_batch import InputBatch, sample_rows
from engine.model_config import ModelConfig
from engine.models import CausalLM
from engine.scheduling import SamplerOutput, SchedulerOutput


class ModelRunner(Protocol):
    """Computes a step's rows over the KV pool and draws the tokens it asks for."""

    def run(self, output: SchedulerOutput) -> SamplerOutput: ...


class TorchModelRunner:
    """Runs a CausalLM in eager torch: on a GPU, and on a CPU as the reference."""

    def __init__(
        self, model: CausalLM, cache: CacheEngine, model_config: ModelConfig, config: EngineConfig, max_blocks: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = Sampler(model_config.eos_token_ids)
        device = cache.kv_pool.device
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
        return self._sampler.sample(logits.cpu().numpy(), requests, logits_rows)
