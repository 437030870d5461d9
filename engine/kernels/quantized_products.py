"""Products with 8-bit weights by torch's own operators; rows are quantised to 8 bits as they come.

    y[r, n] = row_scales[r] · channel_scales[n] · Σ_k codes[r, k] · weight[n, k]  + bias[n]

Codes are int8 (`torch._int_mm`, whose sums are exact, so that a row's result is the same bits in any batch) or
float8 e4m3 (`torch._scaled_mm`, on GPUs of compute capability 8.9 and later; dequantised and multiplied elsewhere).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_SCALE = 1e-12  # of a row of zeros
UNIT = {torch.int8: 8, torch.float8_e4m3fn: 16}  # what both sides of a matrix must be multiples of
# torch._int_mm takes no fewer than 17 rows on a GPU.
_LEAST_ROWS = 32


class QuantizedRows(NamedTuple):
    """Rows as codes `[num_rows or more, dim]`, and float32 `[num_rows]` that they are multiplied by.

    Codes after `num_rows` are undefined.
    """

    codes: torch.Tensor
    scales: torch.Tensor


class RowKernels(Protocol):
    """What is done before and after a product."""

    def quantize_rows(self, x: torch.Tensor, code_type: torch.dtype, least_rows: int) -> QuantizedRows:
        """The nearest codes, ties to even, to `x [num_rows, dim] / scale`, where a row's scale takes its largest
        magnitude to the largest code; at least `least_rows` rows of codes."""
        ...

    def scale_products(
        self,
        products: torch.Tensor,
        row_scales: torch.Tensor,
        channel_scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """int32 `[num_rows or more, dim]` times both scales, plus a bias, as `dtype [num_rows, dim]`."""
        ...


class TorchRowKernels:
    """In plain torch: on a CPU, and what others must agree with."""

    def quantize_rows(self, x: torch.Tensor, code_type: torch.dtype, least_rows: int) -> QuantizedRows:
        wide, largest = x.float(), LARGEST_CODE[code_type]
        scales = (wide.abs().amax(dim=-1) / largest).clamp_min(SMALLEST_SCALE)
        scaled = (wide / scales.unsqueeze(-1)).clamp(-largest, largest)
        codes = x.new_zeros((max(least_rows, len(x)), x.shape[1]), dtype=code_type)
        codes[: len(x)] = (scaled if code_type.is_floating_point else scaled.round()).to(code_type)
        return QuantizedRows(codes, scales)

    def scale_products(
        self,
        products: torch.Tensor,
        row_scales: torch.Tensor,
        channel_scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        result = products[: len(row_scales)].float() * row_scales.unsqueeze(-1) * channel_scales
        return (result if bias is None else result + bias.float()).to(dtype)


def multiply_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    channel_scales: torch.Tensor,
    bias: torch.Tensor | None,
    kernels: RowKernels,
) -> torch.Tensor:
    """`x Wᵀ + b` in x's type.

    Args:
        x: `[num_rows, in_features]`; bfloat16 where it meets float8 on a GPU.
        weight: codes `[out_features, in_features]`, contiguous, both multiples of `UNIT`.
        channel_scales: float32 `[out_features]`.
        bias: `[out_features]` in x's type.
    """
    if not len(x):
        return x.new_empty((0, len(weight)))
    if weight.dtype == torch.int8:
        rows = kernels.quantize_rows(x, torch.int8, _LEAST_ROWS if x.is_cuda else 0)
        products = torch._int_mm(rows.codes, weight.t())
        return kernels.scale_products(products, rows.scales, channel_scales, bias, x.dtype)
    codes, scales = kernels.quantize_rows(x, weight.dtype, 0)
    if not x.is_cuda:
        products = codes.float() @ weight.float().t()
        return TorchRowKernels().scale_products(products, scales, channel_scales, bias, x.dtype)
    return torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scales.unsqueeze(-1),
        scale_b=channel_scales.unsqueeze(0),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=True,
    )
