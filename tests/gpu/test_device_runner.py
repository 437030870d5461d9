"""The engine with tokens drawn on the device, graphs and swaps by the CUDA library, against the plain torch engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.execution.executor import UniprocExecutor
from engine.execution.torch_runner import TorchModelRunner
from engine.execution.torch_worker import TorchWorker
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.loading import open_checkpoint
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.engine.execution.test_input_batch import FakeGraph
from tests.gpu.conftest import Kernels

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "samples": {"n": 2, "top_p": 0.9, "seed": 3},
    "logprobs": {"logprobs": 2, "top_k": 40},
    "best_of": {"best_of": 2, "seed": 4},
    "beams": {"n": 2, "temperature": 0.0, "use_beam_search": True},
    "penalties": {"repetition_penalty": 1.3, "temperature": 0.0},
    "counts": {"frequency_penalty": 0.4, "presence_penalty": 0.2, "seed": 5, "logprobs": 1},
    "biases": {"logit_bias": {3: 2.0, 9: -5.0}, "min_tokens": 4, "n": 2, "seed": 6},
}


def make_engine(emulated: Kernels | None, *, graphs: bool = False, **options: Any) -> LLMEngine:
    """`emulated`: draw and swap as on a GPU, a step ahead; None is the plain engine."""
    config = EngineConfig.from_dict(
        {
            "block_size": 4,
            "max_model_len": 64,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "kernels": "reference",
            "device": "cpu",
            "async_scheduling": emulated is not None,
            **options,
        }
    )
    checkpoint = open_checkpoint("dummy:tiny")
    model_config = checkpoint.model_config()
    worker = TorchWorker(checkpoint, model_config, config)
    if emulated is not None:
        worker._cuda_only = CudaOnlyKernels(emulated.native.library, lambda: 1)
        worker._kernels.cuda_only = worker._cuda_only  # type: ignore[attr-defined]
    cache_config = CacheConfig.of(config, worker.choose_num_blocks(64))
    engine = LLMEngine(UniprocExecutor(worker), model_config, config, cache_config)
    worker.build_cache(cache_config, engine.max_model_len)
    if graphs:
        plain = worker._runner
        assert isinstance(plain, TorchModelRunner)
        worker._runner = TorchModelRunner(
            worker._model,
            plain._cache,
            model_config,
            config,
            cache_config.blocks_for(64),
            cuda_only=worker._cuda_only,
            capture=FakeGraph,
        )
    return engine


def run(engine: LLMEngine, methods: list[str], max_tokens: int = 7) -> dict[tuple[str, int], list[int]]:
    for index, name in enumerate(methods):
        params = SamplingParams(**{"max_tokens": max_tokens, "ignore_eos": True, **METHODS[name]})
        engine.add_request(EngineRequest(name, [5 + index, 6, 7 + index] * (2 + index), params))
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.check_invariants()
    return tokens


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_all_methods_give_the_plain_engines_tokens(emulated: Kernels, graphs: bool) -> None:
    methods = list(METHODS)
    expected = run(make_engine(None, num_blocks=200), methods)
    engine = make_engine(emulated, graphs=graphs, num_blocks=200)
    assert engine.schedules_ahead
    assert run(engine, methods) == expected


def test_swapped_groups_come_back_as_they_were(emulated: Kernels) -> None:
    methods = ["greedy", "samples", "best_of", "logprobs"]
    expected = run(make_engine(None, num_blocks=200), methods, max_tokens=14)
    engine = make_engine(emulated, graphs=True, num_blocks=12, num_swap_blocks=40, preemption="swap", max_model_len=40)
    assert run(engine, methods, max_tokens=14) == expected
    assert engine.stats().num_swaps > 0, "the pool was meant to be too small"


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("async_scheduling", [False, True])
def test_on_a_gpu_tokens_do_not_depend_on_graphs_or_scheduling(cuda_graphs: bool, async_scheduling: bool) -> None:
    def build(**options: Any) -> LLMEngine:
        common = {"device": "cuda", "dtype": "float32", "max_model_len": 64, "max_num_seqs": 8, "num_blocks": 100}
        # Not dummy:tiny, whose heads are smaller than the CUDA kernels'.
        return LLMEngine.from_options("dummy:smollm2-135m", EngineConfig.from_dict({**common, **options}))

    expected = run(build(cuda_graphs=False, async_scheduling=False), list(METHODS))
    assert run(build(cuda_graphs=cuda_graphs, async_scheduling=async_scheduling), list(METHODS)) == expected


@pytest.mark.gpu
def test_on_a_gpu_the_pool_is_sized_from_what_steps_take() -> None:
    options = {"device": "cuda", "gpu_memory_utilization": 0.5, "num_swap_blocks": 16}
    # So many sequences that they could use more than there is, whatever the GPU.
    engine = LLMEngine.from_options("dummy:smollm2-135m", EngineConfig.from_dict({**options, "max_num_seqs": 2048}))
    free, total = torch.cuda.mem_get_info()
    assert 0.3 * total < total - free < 0.6 * total
    assert engine.cache_config.num_blocks > 1000
