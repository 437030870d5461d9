"""Tensor parallelism over NCCL. Unproven until it has run where there are two GPUs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.parallel import TensorParallelGroup
from engine.parallel.torch_communicator import TorchCommunicator
from tests.engine.parallel.ranks import make_groups
from tests.engine.parallel.test_tokens import MEMORY, batch, check, engine_of
from tests.engine.test_tokens_through_preemption import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
OPTIONS: dict[str, Any] = {"device": "cuda", "kernels": "auto"}


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("preemption", MEMORY)
@pytest.mark.parametrize("source", ["dummy:tiny", "dummy:tiny-gemma3", "dummy:tiny-gpt2", "dummy:tiny-opt"])
def test_two_gpus_give_the_tokens_of_one(source: str, preemption: str, cuda_graphs: bool) -> None:
    """With graphs, each rank replays its share of a decoding step together with what it exchanges."""
    with engine_of(source, num_blocks=1000, **OPTIONS) as alone:
        expected, _ = run(alone, batch())
    parallel_options = {**OPTIONS, **MEMORY[preemption], "cuda_graphs": cuda_graphs}
    with engine_of(source, tensor_parallel_size=2, **parallel_options) as parallel:
        outputs, _ = run(parallel, batch())
    check(outputs, expected)


def test_an_all_reduce_is_captured_in_a_graph() -> None:
    """Replays sum what the tensors hold then; threads stand for the ranks."""

    def body(group: TensorParallelGroup) -> list[float]:
        device = torch.device("cuda", group.rank)
        torch.cuda.set_device(device)
        communicator = TorchCommunicator(group, device)
        values, graph = torch.ones(1024, device=device), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            doubled = values * 2
            communicator.all_reduce(doubled)
        sums = []
        for step in range(3):
            values.fill_(step + group.rank)
            graph.replay()
            sums.append(float(doubled.mean()))
        return sums

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(body, make_groups(2))) == [[2.0, 6.0, 10.0]] * 2


def test_ranks_gather_in_their_order() -> None:
    def body(group: TensorParallelGroup) -> list[list[float]]:
        device = torch.device("cuda", group.rank)
        torch.cuda.set_device(device)
        gathered = TorchCommunicator(group, device).all_gather(torch.full((2,), float(group.rank), device=device))
        return [part.tolist() for part in gathered]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(body, make_groups(2))) == [[[0.0, 0.0], [1.0, 1.0]]] * 2
