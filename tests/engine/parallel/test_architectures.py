"""Every architecture and what its configurations may vary, split: the logits of a prompt are those of one rank. Threads
stand for the ranks; each has a worker of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.execution.worker import create_worker
from engine.loading import open_checkpoint
from engine.loading.stored_tensor import FloatArray
from engine.parallel import ALONE, TensorParallelGroup
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.models.architectures import CASES
from tests.engine.parallel.ranks import make_groups

PROMPT = np.random.default_rng(0).integers(0, 256, 37).astype(np.int32)


def logits(source: str, kernels: str, group: TensorParallelGroup, quantization: str = "none") -> FloatArray:
    options = {
        "kernels": kernels,
        "dtype": "float32",
        "kv_cache_dtype": "float32",
        "quantization": quantization,
        "num_threads": 1,
        "max_num_batched_tokens": 20,
        "tensor_parallel_size": group.world_size,
    }
    config = EngineConfig.from_dict(options)
    checkpoint = open_checkpoint(source)
    worker = create_worker(checkpoint, checkpoint.model_config(), config, parallel=group)
    worker.build_cache(CacheConfig(config.block_size, 4, False), 64)
    assert worker._runner is not None
    return worker._runner.logits(PROMPT)


def of_ranks(source: str, kernels: str, world_size: int, quantization: str = "none") -> FloatArray:
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [pool.submit(logits, source, kernels, group, quantization) for group in make_groups(world_size)]
        found = ranks[0].result()
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_does(case: str, kernels: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    source = str(save_hf(hf_model(architecture, **overrides), tmp_path))
    expected = logits(source, kernels, ALONE)
    for world_size in (2, 3) if overrides.get("num_attention_heads") != 2 else (2,):
        found = of_ranks(source, kernels, world_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_quantised_ranks_are_as_close_as_one_is(tmp_path: Path) -> None:
    """Rows meet the same scales on the same 32 columns; only the order of the sums differs."""
    source = str(save_hf(hf_model("LlamaForCausalLM", head_dim=32), tmp_path))
    expected = logits(source, "native", ALONE, "int8")
    np.testing.assert_allclose(of_ranks(source, "native", 3, "int8"), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_ranks_whose_parts_torch_has_quantised(quantization: str, tmp_path: Path) -> None:
    """Each rank's columns have scales of their own, so that two ranks' logits are as far from one's as 8 bits are from
    float32, and no further."""
    source = str(save_hf(hf_model("LlamaForCausalLM", head_dim=32), tmp_path))
    exact, alone = logits(source, "reference", ALONE), logits(source, "reference", ALONE, quantization)
    ranks = of_ranks(source, "reference", 2, quantization)
    rounding = np.linalg.norm(alone - exact)
    assert rounding > 0.0
    assert np.linalg.norm(ranks - exact) < 1.5 * rounding


def test_the_rows_of_a_step_do_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Batch invariance holds for each number of ranks: the same bits in chunks of 20 rows and of 7."""
    source = str(save_hf(hf_model("LlamaForCausalLM"), tmp_path))
    whole = of_ranks(source, "native", 3)

    def in_chunks(group: TensorParallelGroup) -> FloatArray:
        checkpoint = open_checkpoint(source)
        config = EngineConfig.from_dict(
            {"kernels": "native", "dtype": "float32", "num_threads": 1, "max_num_batched_tokens": 7}
            | {"tensor_parallel_size": 3}
        )
        worker = create_worker(checkpoint, checkpoint.model_config(), config, parallel=group)
        worker.build_cache(CacheConfig(config.block_size, 4, False), 64)
        assert worker._runner is not None
        return worker._runner.logits(PROMPT)

    with ThreadPoolExecutor(3) as pool:
        chunked, *_ = pool.map(in_chunks, make_groups(3))
    np.testing.assert_array_equal(chunked, whole)
