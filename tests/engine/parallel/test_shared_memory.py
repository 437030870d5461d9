"""The native engine's collectives: threads stand for ranks, as each maps the segment for itself; processes where one
must die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest

from engine.errors import CommunicatorError
from engine.kernels.library import KernelLibrary
from engine.parallel import Cancellation, TensorParallelGroup
from engine.parallel.shared_memory import SharedMemoryCommunicator, segment_path
from tests.engine.parallel.ranks import make_groups

T = TypeVar("T")
Body = Callable[[SharedMemoryCommunicator], T]
SLOT = 1 << 16  # values, csrc/cpu/communicator.cpp


def on_each(library: KernelLibrary, world_size: int, body: Body[T], **options: Any) -> list[T]:
    """Each rank's result, in order. The first error is raised."""

    def run(group: TensorParallelGroup) -> T:
        return body(SharedMemoryCommunicator(library, group))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, make_groups(world_size, **options)))


def errors_of(library: KernelLibrary, world_size: int, body: Body[object], **options: Any) -> list[str]:
    def run(communicator: SharedMemoryCommunicator) -> str:
        with pytest.raises(CommunicatorError) as caught:
            body(communicator)
        return str(caught.value)

    return on_each(library, world_size, run, **options)


def values_of(rank: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(rank).standard_normal(count, dtype=np.float32)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 576, SLOT, 2 * SLOT + 17])
def test_sums_are_of_float32_in_the_order_of_ranks(library: KernelLibrary, world_size: int, count: int) -> None:
    def reduce(communicator: SharedMemoryCommunicator) -> Any:
        values = values_of(communicator.rank, count)
        communicator.all_reduce(values)
        return values

    expected = values_of(0, count)
    for rank in range(1, world_size):
        expected = expected + values_of(rank, count)
    for values in on_each(library, world_size, reduce):
        np.testing.assert_array_equal(values, expected)


def test_a_thousand_collectives_of_changing_sizes_stay_in_step(library: KernelLibrary) -> None:
    """Slots are used again two collectives later: a rank that is late must still find what it was to read."""

    def run(communicator: SharedMemoryCommunicator) -> bool:
        rng = np.random.default_rng(communicator.rank)
        for i in range(1000):
            if rng.random() < 0.02:
                time.sleep(rng.random() * 1e-3)
            values = np.full(1 + i * 37 % 900, i + communicator.rank, dtype=np.float32)
            communicator.all_reduce(values)
            if not (values == 3 * i + 3).all():
                return False
        return True

    assert on_each(library, 3, run) == [True] * 3


@pytest.mark.parametrize("count", [1, 1000, SLOT + 5])
def test_rank_0_gathers(library: KernelLibrary, count: int) -> None:
    gathered = on_each(library, 3, lambda communicator: communicator.gather(values_of(communicator.rank, count)))
    np.testing.assert_array_equal(gathered[0], [values_of(rank, count) for rank in range(3)])
    assert [len(other) for other in gathered[1:]] == [0, 0]


def test_the_segment_is_gone_once_all_have_joined(library: KernelLibrary) -> None:
    groups = make_groups(2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(SharedMemoryCommunicator, library, groups[0])
        path = segment_path(groups[0].segment)
        assert waits_for(path.exists)
        second = pool.submit(SharedMemoryCommunicator, library, groups[1])
        first.result(), second.result()
    assert not path.exists()


def test_a_rank_that_never_comes_is_named_and_leaves_no_segment(library: KernelLibrary) -> None:
    group = make_groups(3, join_timeout_s=0.1)[0]
    with pytest.raises(CommunicatorError, match=r"rank 1 has not come to join 1 within 0\.1 s of rank 0"):
        SharedMemoryCommunicator(library, group)
    assert not segment_path(group.segment).exists()


def test_a_killed_rank_0_leaves_no_segment(library: KernelLibrary) -> None:
    """Others that have attached take its file away as they give up."""
    group = make_groups(3, join_timeout_s=1.0)[1]
    code = CHILD.replace("(1, 2, 2,", "(0, 3, 3,")
    child = subprocess.Popen([sys.executable, "-c", code, group.segment])
    try:
        assert waits_for(segment_path(group.segment).exists)
    finally:
        child.kill()
        child.wait()
    # It may have died before it had made all of the file.
    with pytest.raises(CommunicatorError, match=r"rank [02] has not"):
        SharedMemoryCommunicator(library, group)
    assert not segment_path(group.segment).exists()


def test_a_group_without_rank_0_is_given_up(library: KernelLibrary) -> None:
    with pytest.raises(CommunicatorError, match=r"rank 1: .* rank 0 has not made .* in 0.1 s"):
        SharedMemoryCommunicator(library, make_groups(2, join_timeout_s=0.1)[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_ranks_to_join_can_be_cancelled(library: KernelLibrary, rank: int) -> None:
    """Rank 0 waits for the others, which wait for its file."""
    group, cancellation = make_groups(2, join_timeout_s=60.0)[rank], Cancellation()
    threading.Timer(0.1, cancellation.set).start()
    began = time.monotonic()
    with pytest.raises(CommunicatorError, match=f"communicator_join was cancelled on rank {rank}"):
        SharedMemoryCommunicator(library, group, cancellation)
    assert time.monotonic() - began < 10.0
    assert not segment_path(group.segment).exists()


def test_a_segment_of_that_name_must_not_be_there(library: KernelLibrary) -> None:
    group = make_groups(2, join_timeout_s=0.1)[0]
    path = segment_path(group.segment)
    path.write_bytes(b"another's")
    with pytest.raises(CommunicatorError, match=f"cannot create {path}: File exists"):
        SharedMemoryCommunicator(library, group)
    assert path.read_bytes() == b"another's"
    path.unlink()


def test_a_late_rank_is_named_on_the_one_that_waited(library: KernelLibrary) -> None:
    def body(communicator: SharedMemoryCommunicator) -> None:
        if communicator.rank == 1:
            time.sleep(0.5)
        communicator.all_reduce(np.zeros(4, dtype=np.float32))

    first, second = errors_of(library, 2, body, timeout_s=0.1)
    assert first == "rank 0: rank 1 has not come to all_reduce 2 within 0.1 s of rank 0"
    assert second == "rank 1: all_reduce was aborted by rank 0, which had waited for rank 1"


def test_ranks_out_of_step_are_named_on_all(library: KernelLibrary) -> None:
    def body(communicator: SharedMemoryCommunicator) -> None:
        communicator.all_reduce(np.zeros(4 if communicator.rank == 2 else 5, dtype=np.float32))

    first, second, third = errors_of(library, 3, body)
    assert first == "rank 0: ranks 0 and 2 are out of step: all_reduce of 5 values, all_reduce of 4"
    assert "ranks 1 and 2 are out of step" in second
    assert "ranks 2 and 0 are out of step" in third


def test_an_abort_ends_waits_and_all_that_follows(library: KernelLibrary) -> None:
    """As a driver does that has learnt of a rank's death: from another thread, long before the deadline."""

    def body(communicator: SharedMemoryCommunicator) -> None:
        if communicator.rank == 1:
            for wait in (0.2, 0.0):
                time.sleep(wait)
                with pytest.raises(CommunicatorError, match="aborted on rank 0"):
                    communicator.all_reduce(np.zeros(4, dtype=np.float32))
            raise CommunicatorError("as expected")
        threading.Timer(0.1, communicator.abort).start()
        communicator.all_reduce(np.zeros(4, dtype=np.float32))

    began = time.monotonic()
    assert errors_of(library, 2, body, timeout_s=60.0) == [
        "rank 0: all_reduce was aborted on rank 0",
        "as expected",
    ]
    assert time.monotonic() - began < 10


CHILD = """
import sys, numpy as np
from engine.kernels.library import load_library
from engine.parallel import TensorParallelGroup
from engine.parallel.shared_memory import SharedMemoryCommunicator
group = TensorParallelGroup(1, 2, 2, "127.0.0.1:1", sys.argv[1])
communicator = SharedMemoryCommunicator(load_library("cpu").library, group)
values = np.ones(8, dtype=np.float32)
while True:
    communicator.all_reduce(values)
"""


def test_a_killed_rank_is_noticed_at_the_deadline(library: KernelLibrary) -> None:
    group = make_groups(2, timeout_s=0.5)[0]
    child = subprocess.Popen([sys.executable, "-c", CHILD, group.segment])
    try:
        communicator = SharedMemoryCommunicator(library, group)
        for _ in range(100):
            values = np.ones(8, dtype=np.float32)
            communicator.all_reduce(values)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        began = time.monotonic()
        with pytest.raises(CommunicatorError, match="rank 1 has not come to all_reduce"):
            reduce_twice(communicator)
        assert 0.4 < time.monotonic() - began < 5
    finally:
        child.kill()
        child.wait()
    assert not segment_path(group.segment).exists()


def reduce_twice(communicator: SharedMemoryCommunicator) -> None:
    """A rank that has died may have come to one collective more than this one."""
    for _ in range(2):
        communicator.all_reduce(np.ones(8, dtype=np.float32))


def waits_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(1e-3)
    return condition()
