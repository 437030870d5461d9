"""Ranks that compute next to nothing, for tests of the control channel: `python -m tests.engine.control.ranks`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from engine.adapters import LoraAdapter
from engine.config import CacheConfig
from engine.control import RankSetup, serve_rank
from engine.control.processes import read_invitation
from engine.errors import ConfigError, QuireError
from engine.parallel import Cancellation
from engine.preemption import SwapCost
from engine.scheduling import SampledToken, SamplerOutput, SchedulerOutput

# Sequences whose step makes rank 1 do what it must not.
EXIT, HANG, RAISE, STOP_SIGNAL = 1001, 1002, 1003, 1004
FAILS_TO_LOAD, NEVER_LOADS, LOADS_ON = "fails-to-load", "never-loads", "loads-on"


class SummingWorker:
    """Draws, for each sequence, the sum of all that it was told of it: equal ranks draw equal tokens.

    `model` is a folder, where each rank writes what it has drawn, or what is to go wrong.
    """

    def __init__(self, setup: RankSetup, cancellation: Cancellation) -> None:
        self._rank = setup.group.rank
        self._folder = Path(setup.model)
        self.swap_cost: SwapCost | None = None
        self.aborted = False
        if setup.model == FAILS_TO_LOAD and self._rank:
            raise ConfigError("option=1 must be 2")
        if setup.model == NEVER_LOADS and self._rank:
            os._exit(7)
        while setup.model == LOADS_ON and self._rank:
            cancellation.check()
            time.sleep(0.02)

    def choose_num_blocks(self, max_model_len: int) -> int:
        return max_model_len - self._rank

    def build_cache(self, cache_config: CacheConfig, max_model_len: int) -> None:
        assert cache_config.num_blocks <= max_model_len
        if cache_config.num_swap_blocks:
            self.swap_cost = SwapCost(100, 100.0 / (1 + self._rank), 100.0)

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
        tokens = tuple(
            SampledToken(item.seq_id, int(item.token_ids.sum() + item.block_table.sum() + item.start), 0.0, ())
            for item in output.scheduled
        )
        if self._rank:
            self._misbehave(output)
        if self._folder.is_dir():
            with (self._folder / str(self._rank)).open("a") as file:
                print([token.token_id for token in tokens], file=file)
        return SamplerOutput(tokens)

    def abort(self) -> None:
        self.aborted = True

    def _misbehave(self, output: SchedulerOutput) -> None:
        told = {item.seq_id for item in output.scheduled}
        if EXIT in told:
            os.kill(os.getpid(), signal.SIGKILL)
        if STOP_SIGNAL in told:
            os.kill(os.getpid(), signal.SIGSTOP)
        if RAISE in told:
            raise RuntimeError("the kernel failed")
        while HANG in told and not self.aborted:
            time.sleep(0.05)


if __name__ == "__main__":
    try:
        serve_rank(read_invitation(), SummingWorker)
    except QuireError:
        sys.exit(1)
