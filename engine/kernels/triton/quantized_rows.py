"""What surrounds a product with 8-bit weights: its rows quantised, and its int32 sums scaled; a launch each, and no row
matters to another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.library import KernelError
from engine.kernels.quantized_products import LARGEST_CODE, SMALLEST_SCALE, QuantizedRows
from engine.kernels.triton.attention_plan import next_power_of_two

LARGEST_TILE = 1 << 14
COLUMNS = 1024


@triton.jit
def quantize_rows_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    x: tl.tensor,
    x_row_stride: tl.tensor,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """A program has a row, in tiles. ROUND: to integers, ties to even, which a cast to an integer would cut off."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE)
    magnitudes = tl.zeros([TILE], dtype=tl.float32)
    for start in range(0, DIM, TILE):
        values = tl.load(x + row * x_row_stride + start + columns, mask=start + columns < DIM, other=0.0)
        magnitudes = tl.maximum(magnitudes, tl.abs(values.to(tl.float32)))
    scale = tl.maximum(tl.div_rn(tl.max(magnitudes, axis=0), LARGEST), SMALLEST_SCALE)
    tl.store(scales + row, scale)
    for start in range(0, DIM, TILE):
        inside = start + columns < DIM
        values = tl.load(x + row * x_row_stride + start + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(tl.div_rn(values, scale), -LARGEST), LARGEST)
        if ROUND:
            scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 · 2²³, beside which float32 has no fractions
        tl.store(codes + row * DIM + start + columns, scaled.to(codes.dtype.element_ty), mask=inside)


@triton.jit
def scale_products_kernel(
    out: tl.tensor,
    products: tl.tensor,
    row_scales: tl.tensor,
    channel_scales: tl.tensor,
    bias: tl.tensor,
    dim: tl.tensor,
    BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    result = tl.load(products + row * dim + columns, mask=inside, other=0).to(tl.float32)
    result = result * tl.load(row_scales + row) * tl.load(channel_scales + columns, mask=inside, other=0.0)
    if BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), mask=inside)


class TritonRowKernels:
    """RowKernels in Triton, on tensors of one device."""

    def quantize_rows(self, x: torch.Tensor, code_type: torch.dtype, least_rows: int) -> QuantizedRows:
        if x.dim() != 2 or x.stride(-1) != 1:
            raise KernelError(f"x has shape {list(x.shape)} and strides {list(x.stride())}, expected rows")
        num_rows, dim = x.shape
        codes = torch.empty((max(least_rows, num_rows), dim), dtype=code_type, device=x.device)
        scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
        if num_rows:
            tile = min(next_power_of_two(dim), LARGEST_TILE)
            quantize_rows_kernel[num_rows,](
                codes,
                scales,
                x,
                x.stride(0),
                DIM=dim,
                TILE=tile,
                LARGEST=LARGEST_CODE[code_type],
                SMALLEST_SCALE=SMALLEST_SCALE,
                ROUND=not code_type.is_floating_point,
                num_warps=max(1, min(16, tile // 512)),
            )
        return QuantizedRows(codes, scales)

    def scale_products(
        self,
        products: torch.Tensor,
        row_scales: torch.Tensor,
        channel_scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        num_rows, dim = len(row_scales), products.shape[1]
        if len(products) < num_rows or not products.is_contiguous():
            raise KernelError(f"products must be contiguous [{num_rows} or more, dim], not {list(products.shape)}")
        for what, vector in (("channel_scales", channel_scales), ("bias", bias)):
            if vector is not None and (vector.shape != (dim,) or not vector.is_contiguous()):
                raise KernelError(f"{what} has shape {list(vector.shape)}, products have rows of {dim}")
        out = torch.empty((num_rows, dim), dtype=dtype, device=products.device)
        if out.numel():
            scale_products_kernel[num_rows, -(-dim // COLUMNS)](
                out,
                products,
                row_scales,
                channel_scales,
                channel_scales if bias is None else bias,
                dim,
                BIAS=bias is not None,
                COLUMNS=COLUMNS,
                enable_fp_fusion=False,
            )
        return out
