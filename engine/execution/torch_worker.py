"""One rank that computes with torch."""

from __future__ import annotations

import logging

import torch

from engine.adapters import LoraAdapter
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.execution import platform
from engine.execution.cache_engine import CacheEngine
from engine.execution.decode_graphs import CudaCapture
from engine.execution.executor import PendingStep
from engine.execution.host import num_available_cores
from engine.execution.memory_profile import largest_steps, peak_bytes
from engine.execution.torch_adapters import TorchAdapters, prepare_adapter
from engine.execution.torch_runner import TorchModelRunner
from engine.execution.weight_format import choose_weight_format
from engine.execution.worker import Worker
from engine.kernels import select_backend
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.loading import Checkpoint, load_model
from engine.model_config import ModelConfig
from engine.parallel import ALONE, Cancellation, TensorParallelGroup
from engine.parallel.rank import Rank
from engine.parallel.torch_communicator import TorchCommunicator
from engine.progress import Progress
from engine.scheduling import SchedulerOutput

logger = logging.getLogger(__name__)


class TorchWorker(Worker):
    """A model in torch: on a GPU, and on a CPU as the reference."""

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
        if config.kv_cache_dtype == "int8":
            raise ConfigError("kv_cache_dtype='int8' needs the native CPU engine")
        self._device = platform.resolve_device(config.device, parallel.rank)
        self._dtype = platform.resolve_dtype(config.dtype, self._device)
        weight_format = choose_weight_format(config, self._device, self._dtype)
        self._kv_dtype = self._dtype if config.kv_cache_dtype == "auto" else getattr(torch, config.kv_cache_dtype)
        num_threads = config.num_threads or max(1, num_available_cores() // parallel.num_local_ranks - 1)
        torch.set_num_threads(num_threads)
        self._kernels = select_backend(
            config.kernels, self._device.type, num_threads, config.batch_invariant, model_config.head_dim
        )
        self._communicator = None
        if parallel.is_parallel:
            self._communicator = TorchCommunicator(parallel, self._device, cancellation)
        self._cuda_only: CudaOnlyKernels | None = getattr(self._kernels, "cuda_only", None)
        if parallel.is_parallel:
            self._cuda_only = None  # one rank draws, and the others learn of its tokens through the host
        self.overlaps = self._cuda_only is not None
        self._model = load_model(
            checkpoint,
            model_config,
            self._kernels,
            self._dtype,
            self._device,
            (lambda done, total: progress("loading weights", done, total)) if progress else None,
            Rank(self._shard, self._communicator),
            weight_format,
        )

    def abort(self) -> None:
        if self._communicator is not None:
            self._communicator.abort()

    def block_bytes(self) -> int:
        return CacheEngine.block_bytes(self._shard_config, self._config.block_size, self._kv_dtype)

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        return self._dtype.itemsize * adapter.num_elements

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        keys = [key for keys, _ in self._model.adaptable_linears() for key in keys]
        return prepare_adapter(adapter, keys, self._dtype, self._device)

    def kv_cache_budget(self) -> int:
        activations = 0
        if self._device.type == "cuda":
            activations = self._peak_of_largest_steps()
            torch.cuda.empty_cache()  # what that took counts once
        budget = platform.kv_cache_budget(self._device, self._config.gpu_memory_utilization) - activations
        return budget if self._device.type == "cuda" else budget // self._parallel.num_local_ranks

    def _peak_of_largest_steps(self) -> int:
        """What steps need beside weights and pool, measured over a pool just large enough for them.

        The eager peaks of both are kept free, as graphs keep the memory of the largest decoding step for good.
        """
        config = self._config
        max_len = self._model_config.max_position_embeddings
        steps = largest_steps(config.max_num_batched_tokens, config.max_num_seqs, max_len, config.block_size)
        cache_config = CacheConfig(config.block_size, -(-config.max_num_batched_tokens // config.block_size), False)
        cache = CacheEngine(self._shard_config, cache_config, self._kv_dtype, self._device, self._kernels)
        runner = TorchModelRunner(
            self._model,
            cache,
            self._model_config,
            config,
            cache_config.num_blocks,
            draws=self._parallel.rank == 0,
            cuda_only=self._cuda_only,
        )
        return sum(peak_bytes(lambda step=step: runner.run(step), self._device) for step in steps)  # type: ignore[misc]

    def submit(self, output: SchedulerOutput) -> PendingStep:
        if self._cuda_only is None:
            return super().submit(output)
        assert isinstance(self._runner, TorchModelRunner), "build_cache() comes first"
        return self._runner.submit(output)

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        cache = CacheEngine(self._shard_config, cache_config, self._kv_dtype, self._device, self._kernels)
        logger.info(
            "KV cache: %d blocks of %d tokens, %.2f GiB, %s on %s, kernels: %s",
            cache_config.num_blocks,
            cache_config.block_size,
            cache.kv_pool.nbytes / 2**30,
            str(self._kv_dtype).removeprefix("torch."),
            self._device,
            self._kernels.name,
        )
        if cache_config.num_swap_blocks:
            self.swap_cost = cache.measure_swap_cost()
        max_blocks = cache_config.blocks_for(max_model_len)
        wanted = self._config.cuda_graphs
        captures = self._device.type == "cuda" and (not self._parallel.is_parallel if wanted == "auto" else wanted)
        self._runner = TorchModelRunner(
            self._model,
            cache,
            self._model_config,
            self._config,
            max_blocks,
            draws=self._parallel.rank == 0,
            cuda_only=self._cuda_only,
            capture=CudaCapture() if captures else None,
            adapters=self._make_adapters(),
        )

    def _make_adapters(self) -> TorchAdapters | None:
        if not self._config.enable_lora:
            return None
        return TorchAdapters(self._model, self._kernels, self._dtype, self._device)
