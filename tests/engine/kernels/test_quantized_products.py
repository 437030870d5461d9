"""Products with 8-bit weights against float64, and rows that do not depend on others."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.quantized_products import LARGEST_CODE, TorchRowKernels, multiply_quantized

KERNELS = TorchRowKernels()
CODE_TYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_codes_are_the_nearest_and_reach_the_largest(code_type: torch.dtype) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 5).unsqueeze(-1)
    codes, scales = KERNELS.quantize_rows(x, code_type, 7)
    assert codes.shape == (7, 64)
    values = codes[:5].float()
    assert torch.equal(values.abs().amax(1), torch.full((5,), LARGEST_CODE[code_type]))
    exact = x.double() / scales.double().unsqueeze(-1)
    # int8 is off by half a step of 1 at most, e4m3 by half a step of its 3 bits, and by half of 2⁻⁹ near zero.
    bound = torch.tensor(0.5) if code_type == torch.int8 else torch.maximum(exact.abs() * 2**-4, torch.tensor(2**-10))
    assert torch.all((values - exact).abs() <= bound * (1 + 1e-5))


@pytest.mark.parametrize("code_type", CODE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 17, 40])
def test_products_are_those_of_the_codes(num_rows: int, dtype: torch.dtype, code_type: torch.dtype) -> None:
    torch.manual_seed(num_rows)
    x, bias = torch.randn(num_rows, 96).to(dtype), torch.randn(48).to(dtype)
    weight, channel_scales = KERNELS.quantize_rows(torch.randn(48, 96), code_type, 0)
    codes, scales = KERNELS.quantize_rows(x, code_type, 0)
    exact = codes.double() * scales.double()[:, None] @ (weight.double() * channel_scales.double()[:, None]).T
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    found = multiply_quantized(x, weight, channel_scales, bias, KERNELS)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact + bias.double(), atol=1e-5, rtol=rtol)
    plain = multiply_quantized(x, weight, channel_scales, None, KERNELS)
    torch.testing.assert_close(plain.double(), exact, atol=1e-5, rtol=2**-8 if dtype != torch.float32 else 1e-5)


def test_a_row_of_int8_is_bitwise_the_same_alone_and_in_any_batch() -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(40, 96), torch.randn(48)
    weight, channel_scales = KERNELS.quantize_rows(torch.randn(48, 96), torch.int8, 0)
    whole = multiply_quantized(x, weight, channel_scales, bias, KERNELS)
    for first, last in ((0, 1), (39, 40), (3, 20)):
        assert torch.equal(multiply_quantized(x[first:last], weight, channel_scales, bias, KERNELS), whole[first:last])


@pytest.mark.parametrize("code_type", CODE_TYPES)
def test_rows_of_zeros_and_no_rows(code_type: torch.dtype) -> None:
    weight, channel_scales = KERNELS.quantize_rows(torch.zeros(16, 32), code_type, 0)
    assert torch.equal(multiply_quantized(torch.ones(2, 32), weight, channel_scales, None, KERNELS), torch.zeros(2, 16))
    assert multiply_quantized(torch.ones(0, 32), weight, channel_scales, None, KERNELS).shape == (0, 16)
