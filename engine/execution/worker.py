"""One rank's device: the model, the KV pool, and the runner over both."""

from __future__ import annotations

import logging

import torch

from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.execution import platform
from engine.execution.cache_engine import CacheEngine
from engine.execution.model_runner import ModelRunner, TorchModelRunner
from engine.kernels import select_backend
from engine.loading import Checkpoint, load_model
from engine.memory import run_size
from engine.model_config import ModelConfig
from engine.preemption import SwapCost
from engine.progress import Progress
from engine.scheduling import SamplerOutput, SchedulerOutput

logger = logging.getLogger(__name__)


class Worker:
    """Loads the model, then builds the pool, then runs steps. Keeps no allocation state."""

    def __init__(
        self, checkpoint: Checkpoint, model_config: ModelConfig, config: EngineConfig, progress: Progress | None = None
    ) -> None:
        self._model_config = model_config
        self._config = config
        self._device = platform.resolve_device(config.device)
        self._dtype = platform.resolve_dtype(config.dtype, self._device)
        self._kv_dtype = self._dtype if config.kv_cache_dtype == "auto" else getattr(torch, config.kv_cache_dtype)
        num_threads = config.num_threads or max(1, platform.num_available_cores() - 1)
        torch.set_num_threads(num_threads)
        self._kernels = select_backend(config.kernels, self._device.type, num_threads)
        self._model = load_model(
            checkpoint,
            model_config,
            self._kernels,
            self._dtype,
            self._device,
            (lambda done, total: progress("loading weights", done, total)) if progress else None,
        )
        self._runner: ModelRunner | None = None
        # What swapping costs here, measured by build_cache() if there is a swap pool.
        self.swap_cost: SwapCost | None = None

    def choose_num_blocks(self, max_model_len: int) -> int:
        """`num_blocks` as configured, or as many as the memory fraction allows, though no more than can be used."""
        if self._config.num_blocks is not None:
            return self._config.num_blocks
        block_bytes = CacheEngine.block_bytes(self._model_config, self._config.block_size, self._kv_dtype)
        free_bytes = platform.kv_cache_budget(self._device, self._config.gpu_memory_utilization)
        affordable = free_bytes // block_bytes
        if affordable < 1:
            raise ConfigError(
                f"no memory for the KV cache: one block takes {block_bytes} bytes and {free_bytes} are left; "
                "raise gpu_memory_utilization or use a smaller model"
            )
        longest = -(-max_model_len // self._config.block_size)
        # A contiguous reservation is a run, whose size is a power of two.
        most = longest if self._config.reservation == "paged" else run_size(longest)
        return min(affordable, self._config.max_num_seqs * most)

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """Allocate the pool and make the worker ready to run steps."""
        cache = CacheEngine(self._model_config, cache_config, self._kv_dtype, self._device, self._kernels)
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
        self._runner = TorchModelRunner(self._model, cache, self._model_config, self._config, max_blocks)

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        assert self._runner is not None, "build_cache() comes first"
        return self._runner.run(output)
