"""Runs steps in torch: on a GPU, where decoding replays graphs, and on a CPU as the reference."""

from __future__ import annotations

import numpy as np
import torch

from engine.config import EngineConfig
from engine.decoding.sampler import Sampler
from engine.errors import ConfigError
from engine.execution.adapter_order import by_adapter
from engine.execution.cache_engine import CacheEngine
from engine.execution.decode_graphs import Capture, DecodeGraphs, capture_sizes
from engine.execution.device_draws import DeviceDraws
from engine.execution.executor import FinishedStep, PendingStep
from engine.execution.input_batch import InputBatch, StepInputs
from engine.execution.pinned import PinnedPair
from engine.execution.sample_rows import sample_rows
from engine.execution.torch_adapters import TorchAdapters
from engine.int32_buffer import Int32Array
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.loading.stored_tensor import FloatArray
from engine.model_config import ModelConfig
from engine.models import CausalLM
from engine.scheduling import SamplerOutput, ScheduledSequence, SchedulerOutput


class TorchModelRunner:
    """A ModelRunner over a CausalLM.

    Args:
        max_blocks: blocks of one sequence.
        draws: whether tokens are drawn here: on one rank of several.
        cuda_only: draws tokens on the device, so that a step need not end before the next is submitted; None draws on
            the host.
        capture: captures graphs of decoding steps; None computes all steps eagerly, as those with adapters always are.
        adapters: the model's slots of adapters; None where steps have none.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: CacheEngine,
        model_config: ModelConfig,
        config: EngineConfig,
        max_blocks: int,
        draws: bool = True,
        cuda_only: CudaOnlyKernels | None = None,
        capture: Capture | None = None,
        adapters: TorchAdapters | None = None,
    ) -> None:
        self._adapters = adapters
        self._draws = draws
        self._model = model
        self._cache = cache
        device = cache.kv_pool.device
        self._max_tokens, self._max_blocks = config.max_num_batched_tokens, min(max_blocks, len(cache.kv_pool))
        self._block_size = config.block_size
        max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._inputs = InputBatch(config.max_num_batched_tokens, max_seqs, max_blocks, config.block_size, device)
        self._logits_rows = PinnedPair((max_seqs,), torch.int64, device)
        self._sampler = Sampler(model_config.eos_token_ids)
        self._device_draws = None
        if cuda_only is not None:
            # A row of a group that has not forked yet is drawn from for each of its sequences.
            self._device_draws = DeviceDraws(cuda_only, model_config.eos_token_ids, config.max_num_seqs, device)
        self._graphs = None
        if capture is not None:
            with torch.inference_mode():
                self._graphs = DecodeGraphs(self._inputs, capture_sizes(max_seqs), self._compute_all, capture)

    def run(self, output: SchedulerOutput) -> SamplerOutput:
        return self.submit(output).result()

    @torch.inference_mode()
    def submit(self, output: SchedulerOutput) -> PendingStep:
        """Queue a step on the current stream. Where tokens are drawn on the device, it may go on from those in flight,
        and nothing waits for it here."""
        self._cache.begin_step(output)
        has_adapters = False
        if self._adapters is not None:
            output = by_adapter(output)
            self._adapters.apply(output.adapters)
            has_adapters = self._adapters.begin_step(output)
        if not output.scheduled:
            return self._nothing_drawn()
        batch_rows, requests, logits_rows = sample_rows(output)
        size = self._graphs.size_for(output) if self._graphs is not None and not has_adapters else None
        if self._graphs is not None and size is not None:
            logits = self._graphs.run(output, size, self._feed)
            logits_rows = [batch_rows[row] for row in logits_rows]
        else:
            inputs = self._inputs.fill(output)
            self._feed(inputs)
            hidden = self._model.forward(inputs.token_ids, self._cache.kv_pool, inputs.metadata)
            if not requests:
                return self._nothing_drawn()
            logits = self._model.compute_logits(hidden[self._logits_rows.next().send(batch_rows)])
        if not self._draws:
            return self._nothing_drawn()
        if self._device_draws is not None:
            return self._device_draws.draw(logits, requests, logits_rows)
        return FinishedStep(self._sampler.sample(logits.cpu().numpy(), requests, logits_rows))

    def _nothing_drawn(self) -> PendingStep:
        if self._device_draws is not None:
            return self._device_draws.nothing()
        if self._cache.kv_pool.device.type == "cuda":
            # The host's buffers are filled again from here on.
            torch.cuda.current_stream(self._cache.kv_pool.device).synchronize()
        return FinishedStep(SamplerOutput())

    def _feed(self, inputs: StepInputs) -> None:
        if self._device_draws is not None:
            self._device_draws.feed(inputs.token_ids, inputs.awaited_rows, inputs.awaited_seq_ids)
        else:
            assert not inputs.awaited_rows, "a token is awaited that no device has drawn"

    def _compute_all(self, inputs: StepInputs) -> torch.Tensor:
        """Logits of all rows."""
        return self._model.compute_logits(self._model.forward(inputs.token_ids, self._cache.kv_pool, inputs.metadata))

    @torch.inference_mode()
    def logits(self, token_ids: Int32Array) -> FloatArray:
        num_blocks = -(-len(token_ids) // self._block_size)
        if num_blocks > self._max_blocks:
            raise ConfigError(f"{len(token_ids)} tokens need {num_blocks} KV blocks, a sequence has {self._max_blocks}")
        block_table = np.arange(num_blocks, dtype=np.int32)
        rows = []
        for start in range(0, len(token_ids), self._max_tokens):
            chunk = ScheduledSequence(0, start, token_ids[start : start + self._max_tokens], block_table, ())
            inputs = self._inputs.fill(SchedulerOutput((chunk,)))
            hidden = self._model.forward(inputs.token_ids, self._cache.kv_pool, inputs.metadata)
            rows.append(self._model.compute_logits(hidden).float().cpu().numpy())
        return np.concatenate(rows)
