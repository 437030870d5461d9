"""One engine over several ranks: rank 0 here, the others wherever their launcher put them (§4.6)."""

from __future__ import annotations

import socket

from engine.adapters import LoraAdapter
from engine.config import CacheConfig, EngineConfig
from engine.control import WorkerGroup, WorkerLauncher
from engine.control.driver import HANG_S
from engine.control.rank import RankWorker, WorkerFactory
from engine.control.step_codec import encode_step
from engine.execution.executor import Executor
from engine.parallel import Cancellation
from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput


class ParallelExecutor(Executor):
    """An Executor whose step is one message to all ranks, and rank 0's own share of it.

    Rank 0 draws. The others compute their part of the logits, and send nothing back.
    """

    def __init__(self, worker: RankWorker, group: WorkerGroup) -> None:
        self._worker = worker
        self._group = group
        self._swap_cost: SwapCost | None = None
        group.when_lost(worker.abort)

    @classmethod
    def start(
        cls,
        model: str,
        config: EngineConfig,
        max_model_len: int,
        make_worker: WorkerFactory,
        launcher: WorkerLauncher,
        hang_s: float = HANG_S,
    ) -> ParallelExecutor:
        """Start the other ranks and load the model on all of them, rank 0's part by `make_worker`.

        Args:
            hang_s: see WorkerGroup.

        Raises:
            CommunicatorError: a rank did not come, or died.
            ConfigError, ModelLoadError: as `make_worker`, on whichever rank.
        """
        group = WorkerGroup(config.tensor_parallel_size, launcher, hang_s)
        group.start()
        try:
            setups = group.setups(model, config, max_model_len, f"{launcher.host}:{_free_port(launcher.host)}")
            group.begin_load(setups)
            cancellation = Cancellation()
            group.when_lost(cancellation.set)
            return cls(make_worker(setups[0], cancellation), group)
        except Exception as error:
            cause = group.cause_of(error)
            group.close()
            raise cause from None

    def choose_num_blocks(self, max_model_len: int) -> int:
        """The least over ranks: they share one block table."""
        return min(self._worker.choose_num_blocks(max_model_len), *self._group.num_blocks())

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """Allocate every rank's pool and make all ready to run steps."""
        self._group.begin_caches(cache_config, max_model_len)
        self._worker.build_cache(cache_config, max_model_len)
        costs = self._group.swap_costs()
        if self._worker.swap_cost is not None:
            # All ranks swap at once, each its part of every block; the slowest decides.
            self._swap_cost = max([self._worker.swap_cost, *costs], key=_seconds_a_block)

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        self._group.rouse()
        self._group.broadcast(encode_step(output))
        try:
            drawn = self._worker.execute(output)
        except Exception as error:
            cause = self._group.cause_of(error)
            if cause is error:
                raise
            raise cause from error
        self._group.finished()
        return drawn

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        return self._worker.read_adapter(name, source)

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        """On all ranks at once: the step that loads it finds each rank's part ready."""
        number = self._group.begin_adapter(adapter.name, adapter.source)
        prepared = self._worker.prepare_adapter(adapter)
        self._group.await_adapter(number)
        return prepared

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """Of rank 0's part; the others' are about as large."""
        return self._worker.adapter_bytes(adapter)

    def swap_cost(self) -> SwapCost | None:
        return self._swap_cost

    def check_health(self) -> None:
        self._group.check_health()

    def close(self) -> None:
        self._worker.abort()
        self._group.close()


def _seconds_a_block(cost: SwapCost) -> float:
    return cost.block_bytes / cost.out_bytes_per_s + cost.block_bytes / cost.in_bytes_per_s


def _free_port(host: str) -> int:
    """A port that nothing listens on now, for the ranks to meet at."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
