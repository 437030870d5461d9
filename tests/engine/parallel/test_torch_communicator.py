"""gloo between threads that stand for ranks; tests/gpu has NCCL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from engine.errors import CommunicatorError
from engine.parallel import Cancellation, TensorParallelGroup
from engine.parallel.torch_communicator import TorchCommunicator
from tests.engine.parallel.ranks import make_groups

T = TypeVar("T")
CPU = torch.device("cpu")


def on_each(world_size: int, body: Callable[[TorchCommunicator], T], timeout_s: float = 20.0) -> list[T]:
    def run(group: TensorParallelGroup) -> T:
        return body(TorchCommunicator(group, CPU))

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, make_groups(world_size, timeout_s=timeout_s)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_parts_reach_every_rank(dtype: torch.dtype) -> None:
    @torch.inference_mode()
    def body(communicator: TorchCommunicator) -> tuple[float, list[float]]:
        values = torch.full((3, 2), 1.0 + communicator.rank, dtype=dtype)
        parts = communicator.all_gather(values[:, :1])
        communicator.all_reduce(values)
        assert (values == values[0, 0]).all()
        return float(values[0, 0]), [float(part[0, 0]) for part in parts]

    assert on_each(3, body) == [(6.0, [1.0, 2.0, 3.0])] * 3


def test_two_groups_in_one_process_do_not_meet() -> None:
    def body(groups: tuple[TensorParallelGroup, TensorParallelGroup]) -> float:
        first, second = (TorchCommunicator(group, CPU) for group in groups)
        values = torch.ones(2)
        second.all_reduce(values)
        first.all_reduce(values)
        return float(values[0])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(body, zip(make_groups(2), make_groups(2), strict=True))) == [4.0, 4.0]


def test_a_rank_that_never_comes() -> None:
    with pytest.raises(CommunicatorError, match=r"rank 1 has not joined rank 0 within 0\.2 s"):
        TorchCommunicator(make_groups(2, join_timeout_s=0.2)[0], CPU)


def test_a_wait_for_ranks_to_join_can_be_cancelled() -> None:
    cancellation = Cancellation()
    threading.Timer(0.1, cancellation.set).start()
    began = time.monotonic()
    with pytest.raises(CommunicatorError, match="cancelled"):
        TorchCommunicator(make_groups(2, join_timeout_s=60.0)[0], CPU, cancellation)
    assert time.monotonic() - began < 10.0


def test_a_rank_that_hangs_is_noticed_at_the_deadline() -> None:
    def body(communicator: TorchCommunicator) -> str:
        if communicator.rank == 1:
            time.sleep(1.5)
            return ""
        with pytest.raises(CommunicatorError, match="rank 0 of 2: all_reduce failed") as caught:
            communicator.all_reduce(torch.ones(4))
        return str(caught.value)

    began = time.monotonic()
    first, _ = on_each(2, body, timeout_s=0.5)
    assert first
    assert time.monotonic() - began < 10


def test_an_abort_ends_a_wait_long_before_its_deadline() -> None:
    """As a driver does that has learnt of a rank's death, from another thread."""

    def body(communicator: TorchCommunicator) -> float:
        if communicator.rank == 1:
            time.sleep(3.0)
            return 0.0
        threading.Timer(0.3, communicator.abort).start()
        began = time.monotonic()
        with pytest.raises(CommunicatorError, match="all_reduce failed"):
            communicator.all_reduce(torch.ones(4))
        return time.monotonic() - began

    waited, _ = on_each(2, body, timeout_s=60.0)
    assert waited < 2.5
