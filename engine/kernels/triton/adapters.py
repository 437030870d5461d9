"""What LoRA adapters add to a product, for all adapters of a batch in two launches: grouped by adapter, as in Punica
(arXiv 2310.18547) and S-LoRA (arXiv 2311.03285).

The rows of a step are ordered by adapter and cut into tiles of one adapter each; a program finds A and B of its tile's
slot by tables of pointers, so that adapters lie where they were loaded, each with its own rank.

    shrink   h[split, row, rank] = x[row, part of K] · A[rank, part of K]      float32, a program for each part of K
    expand   y[row, column] += (sum over splits of h[row, :]) · B[column, :]   a program for each tile of y

Tiles and splits do not depend on the batch, and the partial sums are added in their order: a row's result is the same
alone and beside others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from engine.kernels.adapter_products import AdapterTiles, Factors
from engine.kernels.library import KernelError

# The least that tensor cores multiply: decodes of one adapter are few rows.
TILE_ROWS = 16
RANKS = 16
DEPTH, SPLIT = 128, 512
COLUMNS = 64
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows", "width"])
def shrink_kernel(
    partial: tl.tensor,
    x: tl.tensor,
    a_pointers: tl.tensor,
    rank_ends: tl.tensor,
    tiles: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    x_row_stride: tl.tensor,
    IN_FEATURES: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """partial `[splits, num_rows, width]`; tiles `[n, 3]`: slot, first row, end."""
    tile = tiles + 3 * tl.program_id(0)
    slot = tl.load(tile)
    rows = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = rows < tl.load(tile + 2)
    ranks = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    num_ranks = tl.load(rank_ends + slot * PARTS + PARTS - 1)
    if tl.program_id(2) * RANKS < num_ranks:
        a = tl.load(a_pointers + slot).to(tl.pointer_type(x.dtype.element_ty))
        rank_inside = ranks < num_ranks
        depth = tl.program_id(1) * SPLIT + tl.arange(0, DEPTH)
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for first in range(0, SPLIT, DEPTH):
            place = depth + first
            inside = place < IN_FEATURES
            left = tl.load(
                x + rows[:, None] * x_row_stride + place[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                a + ranks[None, :] * IN_FEATURES + place[:, None],
                mask=rank_inside[None, :] & inside[:, None],
                other=0.0,
            )
            total = tl.dot(left, right, total, input_precision="ieee")
        out = partial + (tl.program_id(1).to(tl.int64) * num_rows + rows[:, None]) * width + ranks[None, :]
        tl.store(out, total, mask=row_inside[:, None] & rank_inside[None, :])


@triton.jit(do_not_specialize=["num_rows", "width"])
def expand_kernel(
    y: tl.tensor,
    partial: tl.tensor,
    b_pointers: tl.tensor,
    rank_ends: tl.tensor,
    tiles: tl.tensor,
    column_tiles: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    y_row_stride: tl.tensor,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """column_tiles `[n, 4]`: part, its first column in y, first column of the tile, end of the part."""
    tile = tiles + 3 * tl.program_id(0)
    slot = tl.load(tile)
    rows = (tl.load(tile + 1) + tl.arange(0, ROWS)).to(tl.int64)
    row_inside = rows < tl.load(tile + 2)
    column_tile = column_tiles + 4 * tl.program_id(1)
    part = tl.load(column_tile)
    columns = tl.load(column_tile + 2) + tl.arange(0, COLUMNS)
    column_inside = columns < tl.load(column_tile + 3)
    ends = rank_ends + slot * PARTS + part
    rank_end = tl.load(ends)
    rank_begin = tl.load(ends - 1, mask=part > 0, other=0)
    if rank_begin < rank_end:
        b = tl.load(b_pointers + slot * PARTS + part).to(tl.pointer_type(y.dtype.element_ty))
        own = (columns - tl.load(column_tile + 1)).to(tl.int64)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, rank_end - rank_begin, RANKS):
            ranks = first + tl.arange(0, RANKS)
            rank_inside = ranks < rank_end - rank_begin
            shrunk = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for split in range(SPLITS):
                place = (rows[:, None] + tl.cast(split, tl.int64) * num_rows) * width + (rank_begin + ranks)[None, :]
                shrunk += tl.load(partial + place, mask=row_inside[:, None] & rank_inside[None, :], other=0.0)
            right = tl.load(
                b + own[None, :] * (rank_end - rank_begin) + ranks[:, None],
                mask=column_inside[None, :] & rank_inside[:, None],
                other=0.0,
            )
            total = tl.dot(shrunk.to(right.dtype), right, total, input_precision="ieee")
        place = y + rows[:, None] * y_row_stride + columns[None, :]
        inside = row_inside[:, None] & column_inside[None, :]
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (before + total).to(y.dtype.element_ty), mask=inside)


class TritonAdapterProducts:
    """AdapterProducts of one linear layer.

    Args:
        parts: its projections, as columns of y.
    """

    tile_rows = TILE_ROWS

    def __init__(self, parts: Sequence[slice], device: torch.device) -> None:
        self._device = device
        self._num_parts = len(parts)
        found = [
            (index, part.start, first, part.stop)
            for index, part in enumerate(parts)
            for first in range(part.start, part.stop, COLUMNS)
        ]
        self._column_tiles = torch.tensor(found, dtype=torch.int32, device=device)
        self._kept: dict[int, list[torch.Tensor]] = {}  # what the tables point to
        self._num_ranks: dict[int, int] = {}
        self._in_features = 0
        self._dtype = torch.float32
        self._a_pointers = torch.zeros(0, dtype=torch.int64, device=device)
        self._b_pointers = torch.zeros((0, self._num_parts), dtype=torch.int64, device=device)
        self._rank_ends = torch.zeros((0, self._num_parts), dtype=torch.int32, device=device)

    def load(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """See AdapterProducts."""
        present = [item for item in factors if item is not None]
        kept = [item.b.contiguous() for item in present]
        pointers = iter([b.data_ptr() for b in kept])
        ends, total = [], 0
        for item in factors:
            total += item.a.shape[0] if item is not None else 0
            ends.append(total)
        a_pointer = 0
        if present:
            a = torch.cat([item.a for item in present])
            self._in_features, self._dtype = a.shape[1], a.dtype
            a_pointer = a.data_ptr()
            kept.append(a)
        if slot >= len(self._a_pointers):
            grown = slot + 1 - len(self._a_pointers)
            self._a_pointers = _grow(self._a_pointers, grown)
            self._b_pointers = _grow(self._b_pointers, grown)
            self._rank_ends = _grow(self._rank_ends, grown)
        self._a_pointers[slot] = a_pointer
        b_pointers = [next(pointers) if item is not None else 0 for item in factors]
        self._b_pointers[slot] = torch.tensor(b_pointers, dtype=torch.int64, device=self._device)
        self._rank_ends[slot] = torch.tensor(ends, dtype=torch.int32, device=self._device)
        self._kept[slot], self._num_ranks[slot] = kept, total

    def drop(self, slot: int) -> None:
        """See AdapterProducts."""
        self._kept.pop(slot, None)
        self._num_ranks.pop(slot, None)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, tiles: AdapterTiles) -> None:
        """See AdapterProducts."""
        width = max((self._num_ranks[slot] for slot in tiles.slots), default=0)
        if not width:
            return
        self._check(y, x)
        num_rows, num_splits = x.shape[0], -(-self._in_features // SPLIT)
        partial = torch.empty((num_splits, num_rows, width), dtype=torch.float32, device=self._device)
        num_tiles = len(tiles.table)
        shrink_kernel[num_tiles, num_splits, -(-width // RANKS)](
            partial,
            x,
            self._a_pointers,
            self._rank_ends,
            tiles.table,
            num_rows,
            width,
            x.stride(0),
            IN_FEATURES=self._in_features,
            PARTS=self._num_parts,
            ROWS=TILE_ROWS,
            RANKS=RANKS,
            DEPTH=DEPTH,
            SPLIT=SPLIT,
            num_warps=NUM_WARPS,
        )
        expand_kernel[num_tiles, len(self._column_tiles)](
            y,
            partial,
            self._b_pointers,
            self._rank_ends,
            tiles.table,
            self._column_tiles,
            num_rows,
            width,
            y.stride(0),
            PARTS=self._num_parts,
            SPLITS=num_splits,
            ROWS=TILE_ROWS,
            RANKS=RANKS,
            COLUMNS=COLUMNS,
            num_warps=NUM_WARPS,
        )

    def _check(self, y: torch.Tensor, x: torch.Tensor) -> None:
        for what, rows in (("x", x), ("y", y)):
            if rows.dim() != 2 or rows.stride(1) != 1 or rows.dtype != self._dtype or rows.device != self._device:
                shape = f"shape {list(rows.shape)}, strides {list(rows.stride())}, {rows.dtype} on {rows.device}"
                raise KernelError(f"{what} has {shape}; the adapters need rows of {self._dtype} on {self._device}")
        if x.shape != (y.shape[0], self._in_features):
            raise KernelError(f"x has shape {list(x.shape)}, expected {[y.shape[0], self._in_features]}")


def _grow(table: torch.Tensor, num_more: int) -> torch.Tensor:
    return torch.cat([table, table.new_zeros((num_more, *table.shape[1:]))])
