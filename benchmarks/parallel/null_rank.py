"""A rank that computes nothing, to time what reaches it: `python -m benchmarks.parallel.null_rank`, for control.py.

When each rank began each step stands in a file that all map; `time.perf_counter_ns` is one clock for all processes of
a machine. Rank 0 ends its step once the others have begun theirs, as its first all-reduce would.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from engine.adapters import LoraAdapter
from engine.config import CacheConfig
from engine.control import RankSetup, serve_rank
from engine.control.processes import read_invitation
from engine.errors import CommunicatorError, ConfigError
from engine.parallel import Cancellation
from engine.preemption import SwapCost
from engine.scheduling import SamplerOutput, SchedulerOutput

MAX_STEPS = 1 << 16
_DEADLINE_S = 20.0


class NullWorker:
    """A RankWorker. `setup.model` is the file, int64 `[ranks, MAX_STEPS]`, of zeros. There is nothing to cancel."""

    def __init__(self, setup: RankSetup, _cancellation: Cancellation) -> None:
        self._rank = setup.group.rank
        self._begun = np.memmap(Path(setup.model), np.int64, "r+", shape=(setup.group.world_size, MAX_STEPS))
        self._step = 0
        self.swap_cost: SwapCost | None = None

    def choose_num_blocks(self, max_model_len: int) -> int:
        """As many as a sequence could want."""
        return max_model_len

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        """There is none."""

    def read_adapter(self, name: str, source: str) -> LoraAdapter:
        """None: nothing is computed."""
        raise ConfigError(f"adapter {name}: {source}: there are no adapters here")

    def adapter_bytes(self, adapter: LoraAdapter) -> int:
        """As float32."""
        return 4 * adapter.num_elements

    def prepare_adapter(self, adapter: LoraAdapter) -> object:
        """Nothing."""
        raise AssertionError(f"adapter {adapter.name} was never read")

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        """Note when this rank could have begun to compute."""
        assert output.scheduled
        self._begun[self._rank, self._step] = time.perf_counter_ns()
        if self._rank == 0:
            deadline = time.monotonic() + _DEADLINE_S
            while not self._begun[1:, self._step].all():
                if time.monotonic() > deadline:
                    raise CommunicatorError(f"not all ranks began step {self._step} within {_DEADLINE_S:g} s")
                time.sleep(0)
        self._step += 1
        return SamplerOutput()

    def abort(self) -> None:
        """Nothing here waits without an end."""


if __name__ == "__main__":
    serve_rank(read_invitation(), NullWorker)
