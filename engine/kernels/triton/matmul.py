"""`x Wᵀ + b` in one order of sums whatever the number of rows: one tile, and K from front to back.

A product of one row by a library is another kernel than that of a thousand: it splits K, or takes other tiles, and
rounds otherwise. Here a row sums its products in the order of K and of the tile's own instructions, alone or not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class MatmulTile(NamedTuple):
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


TILE = MatmulTile(64, 64, 64, num_warps=4, num_stages=4)
WIDE_TILE = MatmulTile(32, 32, 32, num_warps=4, num_stages=1)  # float32, which has no tensor cores


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    out: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    num_rows: tl.tensor,
    x_row_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_TILE: tl.constexpr,
):
    """out `[num_rows, OUT_FEATURES]` and weight `[OUT_FEATURES, IN_FEATURES]`, contiguous."""
    # Row tiles are neighbours, so that a weight tile is read from memory once and then from the L2 cache.
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    depth = tl.arange(0, K_TILE)
    row_inside, column_inside = rows < num_rows, columns < OUT_FEATURES
    x_tile = x + rows[:, None] * x_row_stride + depth[None, :]
    weight_tile = weight + columns[None, :] * IN_FEATURES + depth[:, None]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, IN_FEATURES, K_TILE):
        depth_inside = depth < IN_FEATURES - first
        left = tl.load(x_tile + first, mask=row_inside[:, None] & depth_inside[None, :], other=0.0)
        right = tl.load(weight_tile + first, mask=column_inside[None, :] & depth_inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    place = out + rows[:, None] * OUT_FEATURES + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


def launch_matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[num_rows, in_features]` → `[num_rows, out_features]`."""
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    out = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device)
    tile = WIDE_TILE if x.dtype == torch.float32 else TILE
    if out.numel():
        matmul_kernel[-(-num_rows // tile.rows), -(-out_features // tile.columns)](
            out,
            x,
            weight,
            out if bias is None else bias,
            num_rows,
            x.stride(0),
            IN_FEATURES=in_features,
            OUT_FEATURES=out_features,
            BIAS=bias is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            K_TILE=tile.depth,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out
