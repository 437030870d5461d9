"""One engine over several processes: the same steps everywhere, and a lost rank named within seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.control import RankSetup, WorkerProcesses, driver
from engine.errors import CommunicatorError, ConfigError, EngineDeadError
from engine.execution.parallel_executor import ParallelExecutor
from engine.kernels.library import load_library
from engine.memory import BlockCopy
from engine.parallel import Cancellation
from engine.parallel.shared_memory import SharedMemoryCommunicator
from engine.parallel.torch_communicator import TorchCommunicator
from engine.scheduling import SamplerOutput, ScheduledSequence, SchedulerOutput
from tests.engine.control.ranks import (
    EXIT,
    FAILS_TO_LOAD,
    HANG,
    LOADS_ON,
    NEVER_LOADS,
    RAISE,
    STOP_SIGNAL,
    SummingWorker,
)

MODULE = "tests.engine.control.ranks"


def step(seq_id: int, start: int = 0) -> SchedulerOutput:
    tokens = np.arange(start, start + 3, dtype=np.int32)
    return SchedulerOutput((ScheduledSequence(seq_id, start, tokens, tokens + 7, ()),), (), (), (BlockCopy(1, 2),))


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("quire-*")}


@contextlib.contextmanager
def executor(
    model: str = "model", size: int = 2, config: EngineConfig | None = None, hang_s: float = 8.0
) -> Iterator[tuple[ParallelExecutor, WorkerProcesses]]:
    config = config or EngineConfig(tensor_parallel_size=size, num_swap_blocks=4)
    launcher = WorkerProcesses(MODULE)
    executor = ParallelExecutor.start(model, config, 32, SummingWorker, launcher, hang_s)
    try:
        executor.build_cache(CacheConfig.of(config, executor.choose_num_blocks(32)), 32)
        yield executor, launcher
    finally:
        executor.close()


def failure(executor: ParallelExecutor, within_s: float) -> str:
    """What the health check says, once it fails."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            executor.check_health()
        except EngineDeadError as error:
            return str(error)
        time.sleep(0.02)
    pytest.fail(f"still healthy after {within_s} s")


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "socket"])
def test_all_ranks_run_the_same_steps(tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shared:
        monkeypatch.setattr(driver, "futexes_work", lambda: False)
    before = segments()
    with executor(str(tmp_path), size=3) as (parallel, launcher):
        assert segments() == before, "names are taken away once all have attached"
        drawn = [parallel.execute(step(seq_id, seq_id)).tokens[0].token_id for seq_id in range(50)]
        pids = [launcher.pid(rank) for rank in (1, 2)]
        lines = "".join(f"[{token}]\n" for token in drawn)
        deadline = time.monotonic() + 10.0
        while any((tmp_path / str(rank)).read_text() != lines for rank in range(3)):
            assert time.monotonic() < deadline, "some rank has not run all steps, or others"
            parallel.check_health()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    assert segments() == before


def test_the_pool_is_the_least_and_a_swap_takes_the_slowest() -> None:
    config = EngineConfig(tensor_parallel_size=3, num_swap_blocks=4)
    launcher = WorkerProcesses(MODULE)
    parallel = ParallelExecutor.start("model", config, 32, SummingWorker, launcher)
    try:
        num_blocks = parallel.choose_num_blocks(32)
        assert num_blocks == 30
        parallel.build_cache(CacheConfig.of(config, num_blocks), 32)
        cost = parallel.swap_cost()
    finally:
        parallel.close()
    assert cost is not None
    assert cost.out_bytes_per_s == pytest.approx(100 / 3)


def test_a_killed_rank_is_named_at_once_even_while_nothing_runs() -> None:
    with executor(size=3) as (parallel, launcher):
        os.kill(launcher.pid(2), signal.SIGKILL)
        assert "rank 2 has died" in failure(parallel, 5.0)
        with pytest.raises(CommunicatorError, match="rank 2"):
            parallel.execute(step(0))


@pytest.mark.parametrize(
    ("seq_id", "message"),
    [
        (EXIT, "rank 1 has died"),
        (RAISE, "rank 1 failed: RuntimeError: the kernel failed"),
        (HANG, "rank 1 hangs in step 2, which rank 0 ended"),
        (STOP_SIGNAL, "rank 1 has been silent for"),
    ],
)
def test_a_rank_that_fails_in_a_step_is_named(seq_id: int, message: str) -> None:
    with executor(hang_s=1.5) as (parallel, launcher):
        parallel.execute(step(0))
        parallel.execute(step(seq_id))
        assert message in failure(parallel, 10.0)
        with pytest.raises(CommunicatorError, match="rank 1"):
            parallel.execute(step(1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(launcher.pid(1), signal.SIGKILL)  # a stopped one would be waited for


def test_a_rank_out_of_step_is_named() -> None:
    with executor() as (parallel, _):
        parallel._group._num_sent += 1
        parallel.execute(step(0))
        assert "rank 1 fell out of step: it was sent step 2 and expects 1" in failure(parallel, 5.0)


def test_a_loss_makes_rank_0_leave_what_it_waits_in() -> None:
    """Rank 0's own collective ends with an error of its own; the lost rank is what is told."""

    class Waiting(SummingWorker):
        def execute(self, output: SchedulerOutput) -> SamplerOutput:
            assert output.scheduled
            while not self.aborted:
                time.sleep(0.01)
            raise CommunicatorError("a collective was aborted")

    config = EngineConfig(tensor_parallel_size=2)
    parallel = ParallelExecutor.start("model", config, 32, Waiting, WorkerProcesses(MODULE))
    try:
        parallel.build_cache(CacheConfig.of(config, parallel.choose_num_blocks(32)), 32)
        with pytest.raises(CommunicatorError, match="rank 1 has died"):
            parallel.execute(step(EXIT))
    finally:
        parallel.close()


def test_what_stops_a_rank_from_loading_stops_the_start() -> None:
    config = EngineConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="rank 1: option=1 must be 2"), executor(FAILS_TO_LOAD, config=config):
        pass
    with pytest.raises(CommunicatorError, match="rank 1 has died"), executor(NEVER_LOADS, config=config):
        pass


def join_in_shared_memory(setup: RankSetup, cancellation: Cancellation) -> None:
    library, reason = load_library("cpu")
    if library is None:
        pytest.skip(str(reason))
    SharedMemoryCommunicator(library, setup.group, cancellation)


def join_by_sockets(setup: RankSetup, cancellation: Cancellation) -> None:
    TorchCommunicator(setup.group, torch.device("cpu"), cancellation)


def read_weights(_setup: RankSetup, cancellation: Cancellation) -> None:
    while True:
        cancellation.check()
        time.sleep(0.02)


@pytest.mark.parametrize("load", [join_in_shared_memory, join_by_sockets, read_weights])
def test_a_rank_lost_while_loading_is_named_within_seconds(
    load: Callable[[RankSetup, Cancellation], None],
) -> None:
    """Rank 0 waits for it to join, which it would for two minutes, or reads its own weights."""

    began: list[float] = []

    def make_worker(setup: RankSetup, cancellation: Cancellation) -> SummingWorker:
        began.append(time.monotonic())
        load(setup, cancellation)
        return SummingWorker(setup, cancellation)

    before = segments()
    config = EngineConfig(tensor_parallel_size=3)
    with pytest.raises(CommunicatorError, match=r"rank [12] has died"):
        ParallelExecutor.start(NEVER_LOADS, config, 32, make_worker, WorkerProcesses(MODULE))
    assert time.monotonic() - began[0] < 10.0
    assert segments() == before


def test_a_rank_that_loads_stops_when_rank_0_fails() -> None:
    def fail(_setup: RankSetup, _cancellation: Cancellation) -> SummingWorker:
        raise ConfigError("rank 0 cannot")

    launcher = WorkerProcesses(MODULE)
    with pytest.raises(ConfigError, match="rank 0 cannot"):
        ParallelExecutor.start(LOADS_ON, EngineConfig(tensor_parallel_size=2), 32, fail, launcher)
    assert launcher.ended(1) == "exit status 0", "it had to be killed"


def test_a_rank_that_never_joins_is_named_with_the_reason() -> None:
    config = EngineConfig(tensor_parallel_size=2)
    with pytest.raises(CommunicatorError, match="rank 1 ended before it joined: exit status 1"):
        ParallelExecutor.start("model", config, 32, SummingWorker, WorkerProcesses("no.such.module"))


def drive(folder: str) -> None:
    """Runs in another process: a driver that has taken a step, written its rank's id, and goes on."""
    with executor(folder) as (parallel, launcher):
        parallel.execute(step(1))
        (Path(folder) / "new").write_text(str(launcher.pid(1)))
        (Path(folder) / "new").rename(Path(folder) / "pid")
        time.sleep(120.0)


def test_ranks_end_with_a_killed_driver(tmp_path: Path) -> None:
    """Whatever ends rank 0's process breaks the lines, and that ends the others."""
    # Not forked: a lock that another thread of this process holds would be held there for ever.
    child = subprocess.Popen([sys.executable, "-c", f"from {__name__} import drive; drive({str(tmp_path)!r})"])
    deadline = time.monotonic() + 60.0
    while not (tmp_path / "pid").exists():
        assert child.poll() is None, "the driver has failed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    rank = int((tmp_path / "pid").read_text())
    child.kill()
    child.wait()
    while Path(f"/proc/{rank}").exists():
        assert time.monotonic() < deadline, "the rank outlives its driver"
        time.sleep(0.05)


def test_the_setup_comes_back_from_json() -> None:
    config = EngineConfig(tensor_parallel_size=2, shared_prefixes={"system": "Be brief."}, num_threads=1)
    (setup, _) = _setups(config)
    found = RankSetup.from_json(setup.to_json())
    assert found.config == EngineConfig(tensor_parallel_size=2, num_threads=1), "prefixes are rank 0's to compute"
    assert found._replace(config=config) == setup
    assert found.group.num_local_ranks == 2


def _setups(config: EngineConfig) -> list[RankSetup]:
    group = driver.WorkerGroup(2, WorkerProcesses(MODULE))
    group.start()
    try:
        return group.setups("model", config, 32, "127.0.0.1:5000")
    finally:
        group.close()
