"""Runs steps on the native CPU decoder: arrays are filled from the SchedulerOutput, then one C++ call does the rest."""

from __future__ import annotations

import ctypes

import numpy as np

from engine.config import EngineConfig
from engine.decoding.sampler import Sampler
from engine.errors import ConfigError
from engine.execution.adapter_order import by_adapter
from engine.execution.host_cache import HostCache
from engine.execution.native_adapters import NativeAdapters
from engine.execution.native_decoder import NativeDecoder
from engine.execution.native_samples import SAMPLE, NativeSamples
from engine.execution.sample_rows import sample_rows
from engine.int32_buffer import Int32Array
from engine.kernels.decoder_abi import StepParams, StepTimes
from engine.loading.packed_weights import PackedWeights
from engine.loading.stored_tensor import FloatArray
from engine.model_config import ModelConfig
from engine.scheduling import SamplerOutput, ScheduledSequence, SchedulerOutput

_NANOSECOND = 1e-9


class NativeModelRunner:
    """A ModelRunner over a NativeDecoder.

    Args:
        max_blocks: blocks of one sequence.
        num_threads: of the C++ call.
        draws: whether tokens are drawn here: on one rank of several.
        adapters: the decoder's slots of adapters; None where steps have none.
    """

    def __init__(
        self,
        decoder: NativeDecoder,
        weights: PackedWeights,
        cache: HostCache,
        model_config: ModelConfig,
        config: EngineConfig,
        max_blocks: int,
        num_threads: int,
        draws: bool = True,
        adapters: NativeAdapters | None = None,
    ) -> None:
        self._adapters = adapters
        self._decoder = decoder
        self._weights = weights
        self._cache = cache
        self._model = model_config
        self._sampler = Sampler(model_config.eos_token_ids)
        self._block_size = config.block_size
        self._max_tokens, self._max_blocks = config.max_num_batched_tokens, min(max_blocks, len(cache.kv_pool))
        self._num_threads = num_threads
        self._draws = draws
        max_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._token_ids = np.zeros(self._max_tokens, dtype=np.int32)
        self._query_start_loc = np.zeros(max_seqs + 1, dtype=np.int32)
        self._seq_lens = np.zeros(max_seqs, dtype=np.int32)
        self._adapter_slots = np.zeros(max_seqs, dtype=np.int32)
        self._block_tables = np.zeros((max_seqs, max_blocks), dtype=np.int32)
        self._times = StepTimes()
        self._calls = 0
        self._params = self._fixed_params()

    def run(self, output: SchedulerOutput) -> SamplerOutput:
        self._cache.swap_out(output.blocks_to_swap_out)
        self._cache.swap_in(output.blocks_to_swap_in)
        self._cache.copy(output.blocks_to_copy)
        if self._adapters is not None:
            self._adapters.apply(output.adapters)
        if not output.scheduled:
            return SamplerOutput()
        output = by_adapter(output)
        self._fill(output)
        batch_rows, requests, rows = sample_rows(output)
        if not self._draws:
            requests, rows = [], []
        samples = NativeSamples(requests, rows, self._model.vocab_size, self._model.eos_token_ids)
        self._step(np.array(batch_rows, dtype=np.int32), samples.samples)
        return samples.results(self._sampler) if requests else SamplerOutput()

    def logits(self, token_ids: Int32Array) -> FloatArray:
        """All rows' logits of one sequence from its start; see `ModelRunner.logits`."""
        num_blocks = -(-len(token_ids) // self._block_size)
        if num_blocks > self._max_blocks:
            raise ConfigError(f"{len(token_ids)} tokens need {num_blocks} KV blocks, a sequence has {self._max_blocks}")
        block_table = np.arange(num_blocks, dtype=np.int32)
        logits = np.empty((len(token_ids), self._model.vocab_size), dtype=np.float32)
        for start in range(0, len(token_ids), self._max_tokens):
            chunk = token_ids[start : start + self._max_tokens]
            self._fill(SchedulerOutput((ScheduledSequence(0, start, chunk, block_table, ()),)))
            samples = np.zeros(len(chunk) if self._draws else 0, dtype=SAMPLE)
            samples["row"], samples["top_p"] = np.arange(len(samples)), 1.0
            samples["logits"] = logits.ctypes.data + (start + np.arange(len(samples))) * logits.strides[0]
            self._step(np.arange(len(chunk), dtype=np.int32), samples)
        return logits

    def phase_seconds(self) -> dict[str, float]:
        """Wall seconds inside the C++ call by phase, and the number of calls, since `reset_phases`."""
        times = self._times
        return {
            "gemm": times.matrices * _NANOSECOND,
            "head": times.head * _NANOSECOND,
            "attention": times.attention * _NANOSECOND,
            "communication": times.communication * _NANOSECOND,
            "other": times.other * _NANOSECOND,
            "total": times.total * _NANOSECOND,
            "calls": float(self._calls),
        }

    def reset_phases(self) -> None:
        ctypes.memset(ctypes.byref(self._times), 0, ctypes.sizeof(self._times))
        self._calls = 0

    def weight_bytes(self) -> dict[str, int]:
        """What a step reads of the packed weights: "gemm", all matrices of the layers, and "head"."""
        matrices = self._weights.matrices
        head = "embedding" if self._model.tie_word_embeddings else "head"
        layers = sum(matrix.data.nbytes for key, matrix in matrices.items() if key.startswith("layers."))
        return {"gemm": layers, "head": matrices[head].data.nbytes}

    def kv_bytes_per_token(self) -> float:
        return float(self._cache.kv_pool.shape[1] / self._block_size)

    def _fixed_params(self) -> StepParams:
        params = StepParams()
        params.token_ids = self._token_ids.ctypes.data
        params.query_start_loc = self._query_start_loc.ctypes.data
        params.adapter_slots = self._adapter_slots.ctypes.data
        params.seq_lens = self._seq_lens.ctypes.data
        params.block_tables = self._block_tables.ctypes.data
        params.block_table_stride = params.max_blocks = self._block_tables.shape[1]
        params.times = ctypes.pointer(self._times)
        params.num_threads = self._num_threads
        return params

    def _fill(self, output: SchedulerOutput) -> None:
        scheduled = output.scheduled
        end = 0
        for row, item in enumerate(scheduled):
            begin, end = end, end + len(item.token_ids)
            self._token_ids[begin:end] = item.token_ids
            self._query_start_loc[row + 1] = end
            self._adapter_slots[row] = item.adapter_slot
            self._seq_lens[row] = item.start + end - begin
            self._block_tables[row, : len(item.block_table)] = item.block_table
        self._params.num_seqs, self._params.num_tokens = len(scheduled), end

    def _step(self, logits_rows: Int32Array, samples: np.ndarray) -> None:
        params = self._params
        params.logits_rows, params.num_logits_rows = logits_rows.ctypes.data, len(logits_rows)
        params.samples, params.num_samples = samples.ctypes.data, len(samples)
        self._decoder.step(params)
        self._calls += 1
