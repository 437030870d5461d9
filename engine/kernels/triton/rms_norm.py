"""RMSNorm, alone and after a residual addition: one program for each row of one group, so that no other row matters."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.library import KernelError
from engine.kernels.triton.attention_plan import next_power_of_two

LARGEST_DIM = 1 << 16  # a row is one tile


@triton.jit
def rms_norm_kernel(
    out: tl.tensor,
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    x_row_stride: tl.tensor,
    x_group_stride: tl.tensor,
    residual_row_stride: tl.tensor,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ADD: tl.constexpr,
):
    """out `[num_rows, num_groups, DIM]` contiguous. ADD: x is first added into `residual`, in place, and the norm is of
    the sum as `residual`'s type holds it."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < DIM
    values = tl.load(x + row * x_row_stride + group * x_group_stride + dims, mask=inside, other=0.0)
    if ADD:
        place = residual + row * residual_row_stride + dims
        total = values.to(tl.float32) + tl.load(place, mask=inside, other=0.0).to(tl.float32)
        values = total.to(values.dtype)
        tl.store(place, values, mask=inside)
    wide = values.to(tl.float32)
    variance = tl.sum(wide * wide, axis=0) / DIM
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    normed = wide * scale * tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (row * tl.num_programs(1) + group) * DIM + dims, normed.to(values.dtype), mask=inside)


def launch_rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x `[num_rows, num_groups, dim]`, residual `[num_rows, dim]` beside one group; a new, contiguous tensor."""
    num_rows, num_groups, dim = x.shape
    if dim > LARGEST_DIM:
        raise KernelError(f"x has rows of {dim}; the Triton norms take up to {LARGEST_DIM}")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        padded = next_power_of_two(dim)
        rms_norm_kernel[num_rows, num_groups](
            out,
            x,
            out if residual is None else residual,
            weight,
            eps,
            x.stride(0),
            x.stride(1),
            0 if residual is None else residual.stride(0),
            DIM=dim,
            PADDED_DIM=padded,
            ADD=residual is not None,
            num_warps=max(1, min(16, padded // 512)),
        )
    return out
