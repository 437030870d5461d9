"""8-bit weights: under replayed graphs as without, and on a GPU the same products as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.kernels.quantized_products import TorchRowKernels, multiply_quantized
from tests.gpu.conftest import Kernels
from tests.gpu.test_device_runner import make_engine, run

CODE_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def skip_without_fp8(quantization: str) -> None:
    if quantization == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9")


@pytest.mark.parametrize("quantization", CODE_TYPES)
def test_graphs_and_draws_on_the_device_give_the_plain_engines_tokens(emulated: Kernels, quantization: str) -> None:
    methods = ["greedy", "samples"]
    expected = run(make_engine(None, num_blocks=100, quantization=quantization), methods)
    assert run(make_engine(emulated, graphs=True, num_blocks=100, quantization=quantization), methods) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", CODE_TYPES)
@pytest.mark.parametrize("num_rows", [1, 16, 17, 300])
def test_on_a_gpu_products_are_the_cpus(num_rows: int, quantization: str) -> None:
    skip_without_fp8(quantization)
    pytest.importorskip("triton", reason="Triton is not installed")
    from engine.kernels.triton.quantized_rows import TritonRowKernels

    torch.manual_seed(num_rows)
    x, bias = torch.randn(num_rows, 4096).bfloat16(), torch.randn(512).bfloat16()
    weight, scales = TorchRowKernels().quantize_rows(torch.randn(512, 4096), CODE_TYPES[quantization], 0)
    for offset in (None, bias):
        expected = multiply_quantized(x, weight, scales, offset, TorchRowKernels()).float()
        moved = None if offset is None else offset.cuda()
        found = multiply_quantized(x.cuda(), weight.cuda(), scales.cuda(), moved, TritonRowKernels()).cpu().float()
        assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_rows_of_int8_are_bitwise_the_same_alone() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from engine.kernels.triton.quantized_rows import TritonRowKernels

    kernels = TritonRowKernels()
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    weight, scales = kernels.quantize_rows(torch.randn(512, 4096, device="cuda"), torch.int8, 0)
    whole = multiply_quantized(x, weight, scales, None, kernels)
    for first, last in ((0, 1), (299, 300), (20, 90)):
        assert torch.equal(multiply_quantized(x[first:last], weight, scales, None, kernels), whole[first:last])


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", CODE_TYPES)
def test_on_a_gpu_tokens_do_not_depend_on_graphs(quantization: str) -> None:
    skip_without_fp8(quantization)

    def build(**options: Any) -> LLMEngine:
        common = {"device": "cuda", "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 8, "num_blocks": 100}
        config = EngineConfig.from_dict({**common, "quantization": quantization, **options})
        return LLMEngine.from_options("dummy:smollm2-135m", config)

    # One sequence: padding is what is left to differ.
    assert run(build(cuda_graphs=True), ["greedy"]) == run(build(cuda_graphs=False), ["greedy"])
