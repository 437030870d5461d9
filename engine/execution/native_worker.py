"""One rank that computes with the native CPU engine."""

from __future__ import annotations

import logging
import sys

from engine.adapters import LoraAdapter
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.execution.host import cpu_multiplies_bfloat16, host_kv_cache_budget, num_available_cores
from engine.execution.host_cache import HostCache
from engine.execution.native_adapters import NativeAdapters, adapter_bytes, pack_adapter
from engine.execution.native_decoder import NativeDecoder, kv_block_bytes
from engine.execution.native_runner import NativeModelRunner
from engine.execution.worker import Worker
from engine.kernels.library import KernelLibrary, KernelsUnavailableError, load_library
from engine.loading import Checkpoint
from engine.loading.packed_weights import WeightPolicy, has_quantized_weights, load_packed_weights
from engine.model_config import ModelConfig
from engine.parallel import ALONE, Cancellation, TensorParallelGroup
from engine.parallel.shared_memory import SharedMemoryCommunicator
from engine.progress import Progress

logger = logging.getLogger(__name__)


class NativeWorker(Worker):
    """Packed weights that the processes of a node share, and one C++ call a step. Needs no torch."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model_config: ModelConfig,
        config: EngineConfig,
        progress: Progress | None = None,
        parallel: TensorParallelGroup = ALONE,
        cancellation: Cancellation | None = None,
    ) -> None:
        super().__init__(model_config, config, parallel)
        if config.quantization == "fp8":
            raise ConfigError(
                "quantization='fp8' needs torch (device='cuda'); the native CPU engine has int8 and native"
            )
        library, reason = load_library("cpu")
        if library is None:
            raise KernelsUnavailableError(f"the native CPU engine is not available: {reason}")
        if config.dtype == "float16":
            raise ConfigError("dtype='float16' is not supported on a CPU; use float32 or bfloat16")
        self._library = library
        self._num_threads = config.num_threads or max(1, num_available_cores() // parallel.num_local_ranks)
        if "torch" in sys.modules:
            # Whatever else uses torch here must not put its threads beside ours.
            sys.modules["torch"].set_num_threads(1)
        policy = _choose_policy(checkpoint, config)
        self._policy = policy
        quantized = policy.quantization != "none"
        default_kv_dtype = "bfloat16" if quantized else policy.dtype
        self._kv_dtype = default_kv_dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
        if self._kv_dtype == "float16":
            raise ConfigError("kv_cache_dtype='float16' is not supported on a CPU; use float32, bfloat16 or int8")
        self._communicator = self._join(library, cancellation)
        self._weights = load_packed_weights(
            checkpoint,
            model_config,
            policy,
            library,
            self._num_threads,
            (lambda done, total: progress("packing weights", done, total)) if progress else None,
            self._shard,
        )

    def _join(self, library: KernelLibrary, cancellation: Cancellation | None) -> SharedMemoryCommunicator | None:
        if not self._parallel.is_parallel:
            return None
        if not self._parallel.on_one_node:
            raise ConfigError(
                f"the native CPU engine needs all {self._parallel.world_size} ranks on one node, here are "
                f"{self._parallel.num_local_ranks}; kernels='cpu' computes with torch across nodes"
            )
        return SharedMemoryCommunicator(library, self._parallel, cancellation)

    def abort(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()

    def block_bytes(self) -> int:
        return kv_block_bytes(self._library, self._shard_config, self._kv_dtype, self._config.block_size)

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        return adapter_bytes(self._library, adapter, self._policy.dtype)

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        return pack_adapter(self._library, adapter, self._shard_config.num_layers, self._policy.dtype)

    def kv_cache_budget(self) -> int:
        return host_kv_cache_budget(self._config.gpu_memory_utilization) // self._parallel.num_local_ranks

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        cache = HostCache(self._library, cache_config, self.block_bytes())
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB, %s; native CPU engine, %s weights, %d threads",
            cache_config.num_blocks,
            cache_config.block_size,
            cache.kv_pool.nbytes / 2**30,
            self._kv_dtype,
            self._policy.dtype if self._policy.quantization == "none" else self._policy.quantization,
            self._num_threads,
        )
        if cache_config.num_swap_blocks:
            self.swap_cost = cache.measure_swap_cost()
        decoder = NativeDecoder(
            self._library,
            self._shard_config,
            self._weights,
            cache.kv_pool,
            self._kv_dtype,
            cache_config.block_size,
            [0, *(vocab.stop for vocab in self._shard.vocabs)],
            self._communicator,
        )
        self._runner = NativeModelRunner(
            decoder,
            self._weights,
            cache,
            self._model_config,
            self._config,
            cache_config.blocks_for(max_model_len),
            self._num_threads,
            draws=self._parallel.rank == 0,
            adapters=NativeAdapters(self._library, decoder, self._shard_config.num_layers, self._policy.dtype),
        )


def _choose_policy(checkpoint: Checkpoint, config: EngineConfig) -> WeightPolicy:
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if cpu_multiplies_bfloat16() else "float32"
    quantization: str = config.quantization
    if quantization == "auto":
        # A type or a place for the cache that was asked for is no reason to compute in another.
        quantization = "native" if config.dtype == "auto" and has_quantized_weights(checkpoint) else "none"
    return WeightPolicy(quantization, dtype)
