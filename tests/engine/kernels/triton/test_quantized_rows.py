"""Triton's row kernels in the interpreter, against plain torch: equal codes, scales and scaled products."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from engine.kernels.quantized_products import TorchRowKernels
from engine.kernels.triton import quantized_rows
from tests.engine.kernels.triton.interpreter import InterpretedRowKernels, Interpreter

REFERENCE = TorchRowKernels()


@pytest.fixture
def rows(interpreter: Interpreter) -> InterpretedRowKernels:
    return InterpretedRowKernels(interpreter)


@pytest.mark.parametrize("code_type", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [40, quantized_rows.LARGEST_TILE + 24], ids=["one tile", "two tiles"])
def test_codes_and_scales(rows: InterpretedRowKernels, dim: int, dtype: torch.dtype, code_type: torch.dtype) -> None:
    torch.manual_seed(dim)
    x = (torch.randn(4, dim + 8) * torch.tensor([[1.0], [1e-2], [0.0], [300.0]])).to(dtype)[:, :dim]  # rows apart
    x[1, dim - 1] = 0.5  # the largest magnitude in the last tile
    x[0, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # codes between integers
    codes, scales = rows.quantize_rows(x, code_type, 6)
    expected = REFERENCE.quantize_rows(x, code_type, 6)
    assert codes.shape == (6, dim)
    assert torch.equal(scales, expected.scales)
    found, wanted = codes[:4].float(), expected.codes[:4].float()
    if code_type == torch.int8:
        assert torch.equal(found, wanted)
        assert found[0, :4].tolist() == [127, 0, 2, -2]
        return
    # The interpreter's float8 is not quite nearest: it takes some ties the other way, and drops a carry into the
    # exponent, so that what rounds up to a power of two comes out as half of it. Few values are either.
    assert (found == wanted).float().mean() > 0.9
    near = (found - wanted).abs() <= (wanted.abs() / 8).clamp_min(2**-6)
    assert torch.all(near | (found == wanted / 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_products(rows: InterpretedRowKernels, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    products = torch.randint(-(1 << 22), 1 << 22, (6, 1030), dtype=torch.int32)
    row_scales, channel_scales = torch.rand(4) * 1e-3, torch.rand(1030) * 1e-3
    offset = torch.randn(1030).to(dtype) if bias else None
    found = rows.scale_products(products, row_scales, channel_scales, offset, dtype)
    assert found.shape == (4, 1030)
    assert torch.equal(found, REFERENCE.scale_products(products, row_scales, channel_scales, offset, dtype))


def test_no_rows_and_what_does_not_fit(rows: InterpretedRowKernels) -> None:
    assert rows.quantize_rows(torch.ones(0, 8), torch.int8, 2).codes.shape == (2, 8)
    with pytest.raises(KernelError, match=r"x has shape \[8, 2\] and strides \[1, 8\], expected rows"):
        rows.quantize_rows(torch.ones(2, 8).t(), torch.int8, 0)
    sums, scales = torch.ones(2, 8, dtype=torch.int32), torch.ones(8)
    with pytest.raises(KernelError, match=r"products must be contiguous \[3 or more, dim\], not \[2, 8\]"):
        rows.scale_products(sums, torch.ones(3), scales, None, torch.float32)
    with pytest.raises(KernelError, match=r"bias has shape \[7\], products have rows of 8"):
        rows.scale_products(sums, torch.ones(2), scales, torch.ones(7), torch.float32)
