"""Which launches a batch's attention takes: tiles, splits and the room for their sums. No tensors, no Triton."""

from __future__ import annotations

from typing import NamedTuple

SEGMENT = 512
"""Tokens of a piece where attention is batch-invariant; a multiple of every tile's tokens."""

_MAX_PARTIAL_BYTES = 256 << 20
_NO_LIMIT = (1 << 31) - 1
_TILES_A_SPLIT = 4  # fewer tiles of tokens than these are not worth a program of their own


class AttentionShape(NamedTuple):
    """What the plan depends on, all of it known to the host.

    Attributes:
        group: query heads of a KV head.
        wide: the dot products are of float32, which has no tensor cores.
    """

    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int
    num_kv_heads: int
    group: int
    head_dim: int
    wide: bool


class Tile(NamedTuple):
    """Query vectors and tokens of a tile, and how a program computes it."""

    lanes: int
    tokens: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """One launch: over the sequences of `min_query_len` to `max_query_len` rows.

    Attributes:
        one_tile: tile i is sequence i; otherwise tiles are found by the sequences' rows.
        partial_rows: rows of a sequence that have room for their splits' sums.
        segment: see paged_attention.py; 0 where bits may depend on the batch.
    """

    min_query_len: int
    max_query_len: int
    one_tile: bool
    num_tiles: int
    num_splits: int
    partial_rows: int
    segment: int
    tile: Tile


def plan_attention(shape: AttentionShape, num_processors: int, batch_invariant: bool) -> list[Launch]:
    """Sequences of so few rows that one small tile holds them (decodes) apart from the others.

    A batch-invariant plan has one kind of tile for all, since tiles of another shape round otherwise.
    """
    if batch_invariant:
        return [_plan_invariant(shape, num_processors)]
    small = choose_tile(16, shape)
    rows = small.lanes // shape.group
    decodes = Launch(1, rows, True, shape.num_seqs, _count_splits(shape, small, num_processors), 1, 0, small)
    decodes = decodes._replace(partial_rows=min(rows, shape.max_query_len))
    if shape.max_query_len <= rows:
        return [decodes]
    large = choose_tile(128 if shape.head_dim <= 128 else 64, shape)
    num_tiles = shape.num_tokens // (large.lanes // shape.group) + shape.num_seqs
    if shape.num_seqs == 1:
        return [Launch(1, _NO_LIMIT, False, num_tiles, 1, 1, 0, large)]
    return [decodes, Launch(rows + 1, _NO_LIMIT, False, num_tiles, 1, 1, 0, large)]


def choose_tile(lanes: int, shape: AttentionShape) -> Tile:
    """A tile of at least `lanes`, more if a group has more heads."""
    lanes = max(lanes, next_power_of_two(shape.group))
    padded_dim = pad_dim(shape.head_dim)
    if shape.wide:
        return Tile(min(lanes, max(32, next_power_of_two(shape.group))), 32 if padded_dim <= 128 else 16, 4, 1)
    tokens = 64 if padded_dim <= 128 else 32
    return Tile(lanes, tokens, 8 if lanes >= 128 or padded_dim > 128 else 4, 3 if padded_dim <= 128 else 2)


def next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def pad_dim(head_dim: int) -> int:
    """What a tile has in place of `head_dim`: Triton's tiles are powers of two, and its products take 16 at least."""
    return max(16, next_power_of_two(head_dim))


def _count_splits(shape: AttentionShape, tile: Tile, num_processors: int) -> int:
    """As many splits as fill the GPU twice, if the tokens suffice."""
    wanted = 2 * num_processors // (shape.num_seqs * shape.num_kv_heads)
    return max(1, min(wanted, shape.max_seq_len // (_TILES_A_SPLIT * tile.tokens)))


def _plan_invariant(shape: AttentionShape, num_processors: int) -> Launch:
    """One program does all pieces of a tile, or each piece has its own: the bits are the same."""
    tile = choose_tile(64 if shape.head_dim <= 128 else 32, shape)
    if not shape.wide:
        # A piece's sums and the row's take twice the registers.
        tile = tile._replace(num_warps=8, tokens=64 if shape.head_dim <= 64 else 32)
    rows = tile.lanes // shape.group
    if shape.max_query_len > rows:
        num_tiles = shape.num_tokens // rows + shape.num_seqs
        return Launch(1, _NO_LIMIT, False, num_tiles, 1, 1, SEGMENT, tile)
    num_splits = -(-shape.max_seq_len // SEGMENT)
    partials = shape.num_seqs * shape.max_query_len * shape.num_kv_heads * shape.group * num_splits
    fills_the_gpu = shape.num_seqs * shape.num_kv_heads >= 2 * num_processors
    if fills_the_gpu or partials * (shape.head_dim + 2) * 4 > _MAX_PARTIAL_BYTES:
        num_splits = 1
    return Launch(1, _NO_LIMIT, True, shape.num_seqs, num_splits, shape.max_query_len, SEGMENT, tile)
