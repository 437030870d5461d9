"""silu(gate) * up, where a row is its gates followed by its ups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 1024


@triton.jit
def silu_and_mul_kernel(
    out: tl.tensor, gate_up: tl.tensor, row_stride: tl.tensor, dim: tl.tensor, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < dim
    gates = gate_up + row * row_stride + columns
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + dim, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * dim + columns, result.to(out.dtype.element_ty), mask=inside)


def launch_silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    num_rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, dim), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        silu_and_mul_kernel[num_rows, -(-dim // _COLUMNS)](out, gate_up, gate_up.stride(0), dim, COLUMNS=_COLUMNS)
    return out
