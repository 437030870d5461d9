"""One rank's device: the model, the KV pool, and the runner over both."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from engine.adapters import LoraAdapter, read_adapter
from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError
from engine.execution.executor import FinishedStep, PendingStep
from engine.execution.host import may_have_gpu
from engine.execution.latest_tokens import LatestTokens
from engine.execution.model_runner import ModelRunner
from engine.kernels.library import load_library
from engine.loading import Checkpoint
from engine.memory import run_size
from engine.model_config import ModelConfig
from engine.parallel import ALONE, Cancellation, TensorParallelGroup, split_decoder
from engine.preemption import SwapCost
from engine.progress import Progress
from engine.scheduling import SamplerOutput, SchedulerOutput

logger = logging.getLogger(__name__)


class Worker(ABC):
    """Loads the model, then builds the pool, then runs steps. Keeps no allocation state.

    Attributes:
        swap_cost: what swapping costs here, measured by build_cache() if there is a swap pool.
        overlaps: whether steps run beside the host, so that preparing one ahead saves time.
    """

    overlaps = False

    def __init__(self, model_config: ModelConfig, config: EngineConfig, parallel: TensorParallelGroup = ALONE) -> None:
        self._model_config = model_config
        self._config = config
        self._parallel = parallel
        self._shard = split_decoder(model_config, parallel.world_size)[parallel.rank]
        self._shard_config = self._shard.config(model_config)
        self._runner: ModelRunner | None = None
        self.swap_cost: SwapCost | None = None
        self._latest = LatestTokens()
        self._adapters: dict[tuple[str, str], LoraAdapter] = {}

    def choose_num_blocks(self, max_model_len: int) -> int:
        """`num_blocks` as configured, or as many as the memory fraction allows, though no more than can be used."""
        if self._config.num_blocks is not None:
            return self._config.num_blocks
        block_bytes = self.block_bytes()
        free_bytes = self.kv_cache_budget()
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

    def abort(self) -> None:  # noqa: B027  # a rank alone waits for nobody
        """Make all ranks leave a collective that they wait in, now and from now on, with a CommunicatorError. Any
        thread may call it: when another rank is known to be lost, and before this one is let go of."""

    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one KV block of all layers."""

    @abstractmethod
    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """What an adapter takes while it is resident."""

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        """This rank's part of an adapter: A's columns where the base's inputs are split, else B's rows. Read once.

        Raises:
            ModelLoadError: see read_adapter.
        """
        known = self._adapters.get((name, source))
        if known is None:
            known = read_adapter(name, source, self._model_config, self._config.max_lora_rank, self._shard)
            self._adapters[name, source] = known
        return known

    @abstractmethod
    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        """See Executor."""

    @abstractmethod
    def kv_cache_budget(self) -> int:
        """Bytes that the KV pool may take now that the weights are loaded."""

    @abstractmethod
    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """Allocate the pool and make the worker ready to run steps."""

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        assert self._runner is not None, "build_cache() comes first"
        return self._runner.run(output)

    def submit(self, output: SchedulerOutput) -> PendingStep:
        """Take a step that may go on from tokens of the step before, which may still run. See AsyncExecutor."""
        drawn = self.execute(self._latest.fill(output))
        self._latest.remember(drawn)
        return FinishedStep(drawn)


def create_worker(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    config: EngineConfig,
    progress: Progress | None = None,
    *,
    parallel: TensorParallelGroup = ALONE,
    cancellation: Cancellation | None = None,
) -> Worker:
    """The native engine on a CPU that has its library, torch everywhere else. Loads the model, or one rank's part.

    Args:
        parallel: the rank; the worker meets the others before it loads anything.
        cancellation: ends its wait for them.

    Raises:
        ModelLoadError: the checkpoint cannot be read.
        ConfigError: an option that the machine or the engine chosen does not have, or more ranks than the model has
            parts.
        CommunicatorError: another rank did not come.
    """
    if parallel.world_size != config.tensor_parallel_size:
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size}, but the worker's group has "
            f"world_size={parallel.world_size}"
        )
    if _runs_natively(config, parallel):
        from engine.execution.native_worker import NativeWorker

        return NativeWorker(checkpoint, model_config, config, progress, parallel, cancellation)
    from engine.execution.torch_worker import TorchWorker

    return TorchWorker(checkpoint, model_config, config, progress, parallel, cancellation)


def _runs_natively(config: EngineConfig, parallel: TensorParallelGroup) -> bool:
    if config.kernels == "native":
        if config.device == "cuda":
            raise ConfigError("kernels='native' cannot run on device='cuda'")
        return True
    if config.kernels != "auto" or config.device == "cuda" or not parallel.on_one_node:
        return False
    if config.device == "auto" and may_have_gpu():
        from engine.execution.platform import resolve_device

        if resolve_device("auto").type == "cuda":
            return False
    library, reason = load_library("cpu")
    if library is None:
        logger.warning("computing with torch, which is slower than the native CPU engine: %s", reason)
    return library is not None
