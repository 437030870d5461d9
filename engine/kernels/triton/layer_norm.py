"""LayerNorm: one program for each row, so that no other row matters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.library import KernelError
from engine.kernels.triton.attention_plan import next_power_of_two
from engine.kernels.triton.rms_norm import LARGEST_DIM


@triton.jit
def layer_norm_kernel(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    eps: tl.tensor,
    x_row_stride: tl.tensor,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """out `[num_rows, DIM]` contiguous. The variance is that of the differences from the mean, in a second pass over
    the row's registers: sums of squares would lose what a large mean leaves of them."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < DIM
    values = tl.load(x + row * x_row_stride + dims, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    centered = tl.where(inside, wide - tl.sum(wide, axis=0) / DIM, 0.0)
    variance = tl.sum(centered * centered, axis=0) / DIM
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    weights = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
    biases = tl.load(bias + dims, mask=inside, other=0.0).to(tl.float32)
    normed = centered * scale * weights + biases
    tl.store(out + row * DIM + dims, normed.to(values.dtype), mask=inside)


def launch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[num_rows, dim]`; a new, contiguous tensor."""
    num_rows, dim = x.shape
    if dim > LARGEST_DIM:
        raise KernelError(f"x has rows of {dim}; the Triton norms take up to {LARGEST_DIM}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        padded = next_power_of_two(dim)
        layer_norm_kernel[num_rows,](
            out,
            x,
            weight,
            bias,
            eps,
            x.stride(0),
            DIM=dim,
            PADDED_DIM=padded,
            num_warps=max(1, min(16, padded // 512)),
        )
    return out
