"""Hands each step's work to the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from engine.adapters import LoraAdapter
from engine.config import CacheConfig
from engine.errors import ConfigError
from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput

if TYPE_CHECKING:
    from engine.execution.worker import Worker


class Executor(Protocol):
    """Runs a step on all ranks and returns the drawn tokens once. One thread steps; any may ask for its health."""

    def execute(self, output: SchedulerOutput) -> SamplerOutput: ...

    def swap_cost(self) -> SwapCost | None:
        """What moving blocks to the host and back costs; None without a swap pool."""
        ...

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """What an adapter takes on the device while it is resident; by default as float32."""
        return 4 * adapter.num_elements

    def prepare_adapter(self, adapter: LoraAdapter) -> object:  # noqa: ARG002 - by default nothing is prepared
        """What can be made of an adapter before it is put into a slot: of its file, beside the steps, on any thread.
        Comes back as AdapterLoad.prepared. None leaves all to the step that loads it."""
        return None

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        """This process' part of an adapter, checked. Any thread may call it.

        Raises:
            ModelLoadError: see read_adapter.
            ConfigError: this device computes none, as by default.
        """
        raise ConfigError(f"adapter {name}: {source}: this device computes no adapters")

    def check_health(self) -> None:
        """Raise EngineDeadError if steps can no longer be run. By default, the caller's own process is all there is."""
        return

    def close(self) -> None:
        """End what was started for the steps. Idempotent."""
        return


class PendingStep(Protocol):
    """A step that was handed to the device."""

    def result(self) -> SamplerOutput:
        """Wait for it; what it drew. Called once, in the order of submission."""
        ...


class FinishedStep(NamedTuple):
    """A step that had run by the time it was handed over."""

    drawn: SamplerOutput

    def result(self) -> SamplerOutput:
        return self.drawn


@runtime_checkable
class AsyncExecutor(Executor, Protocol):
    """An executor that also takes a step while another runs. Steps run in the order of their submission.

    A submitted step may go on from tokens that the step before it draws: `token_ids` has PLACEHOLDER for them, and
    the device, which has them, fills them in. All else is read before `submit` returns.

    Attributes:
        overlaps: whether steps run beside the host, so that preparing one ahead saves time.
    """

    @property
    def overlaps(self) -> bool: ...

    def submit(self, output: SchedulerOutput) -> PendingStep: ...


class UniprocExecutor(AsyncExecutor):
    """One rank, in the caller's thread."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        return self._worker.execute(output)

    @property
    def overlaps(self) -> bool:
        return self._worker.overlaps

    def submit(self, output: SchedulerOutput) -> PendingStep:
        return self._worker.submit(output)

    def swap_cost(self) -> SwapCost | None:
        return self._worker.swap_cost

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        return self._worker.adapter_bytes(adapter)

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        return self._worker.read_adapter(name, source)

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        return self._worker.prepare_adapter(adapter)

    def choose_num_blocks(self, max_model_len: int) -> int:
        """See Worker."""
        return self._worker.choose_num_blocks(max_model_len)

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """See Worker."""
        self._worker.build_cache(cache_config, max_model_len)
