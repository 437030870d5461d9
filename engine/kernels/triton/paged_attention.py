"""Paged attention (§4.1, Eq. 4) with online softmax (FlashAttention-2, arXiv 2307.08691), and the merge of its splits.

    lane of a tile  = row of the sequence * GROUP + query head of the group      LANES, those past the last row idle
    tile            × tokens of the cache, TOKENS at a time, read through the block table

A tile holds all query heads of one KV head, so that K and V are read once for them. A few sequences do not fill a GPU:
their tokens are then split over programs, which leave sums for `merge_kernel`.

With SEGMENT the tokens are cut at its multiples instead, at absolute positions, and the pieces always merged in order,
by one program or by the merge kernel: a row's result then is the same bits whatever its batch, its chunk and the split.
That holds only without fused multiply-adds, which a compiler places otherwise in one kernel than in another.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What changes from batch to batch: no kernel is compiled anew for it.
_VARYING = ["num_tokens", "num_seqs", "min_query_len", "max_query_len", "num_splits", "one_tile", "partial_rows"]


@triton.jit(do_not_specialize=[*_VARYING, "sliding_window", "block_table_stride"])
def paged_attention_kernel(
    out: tl.tensor,
    query: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    query_start_loc: tl.tensor,
    seq_lens: tl.tensor,
    block_tables: tl.tensor,
    partial_out: tl.tensor,
    partial_stats: tl.tensor,
    scale: tl.tensor,
    sliding_window: tl.tensor,
    num_tokens: tl.tensor,
    num_seqs: tl.tensor,
    min_query_len: tl.tensor,
    max_query_len: tl.tensor,
    num_splits: tl.tensor,
    one_tile: tl.tensor,
    partial_rows: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    block_table_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """One tile of a sequence, one KV head, one split. Sequences of fewer rows than `min_query_len` or of more than
    `max_query_len` are another launch's. Splits need `one_tile`: a tile for each sequence.

    Args:
        scale: of the scores, times log2(e).
        sliding_window: tokens that a row sees, 0 for all.
        partial_out, partial_stats: float32 `[num_seqs * partial_rows, num_heads, num_splits, HEAD_DIM]` and `[..., 2]`.
    """
    ROWS: tl.constexpr = LANES // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    lanes, dims = tl.arange(0, LANES), tl.arange(0, PADDED_DIM)
    head = kv_head * GROUP + lanes % GROUP
    inside = dims < HEAD_DIM

    # Rows past the last sequence come out zero; each tile has some of them.
    for padding in range(tl.load(query_start_loc + num_seqs) + tile, num_tokens, tl.num_programs(0)):
        unused = out + (padding * num_heads + head).to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
        tl.store(unused, tl.zeros((LANES, PADDED_DIM), out.dtype.element_ty), mask=inside[None, :])

    sequence, first_row = tile, 0
    if one_tile == 0:
        sequence = sequence_of(tile, query_start_loc, num_seqs, ROWS)
        first_row = (tile - sequence - tl.load(query_start_loc + sequence) // ROWS) * ROWS
    start = tl.load(query_start_loc + sequence)
    num_rows = tl.load(query_start_loc + sequence + 1) - start
    if (first_row < num_rows) & (num_rows >= min_query_len) & (num_rows <= max_query_len):
        row = first_row + lanes // GROUP
        taken = (lanes < ROWS * GROUP) & (row < num_rows)
        queries = query + (start + row).to(tl.int64) * query_token_stride + head * query_head_stride
        tile_query = tl.load(queries[:, None] + dims[None, :], mask=taken[:, None] & inside[None, :], other=0.0)
        tile_query = tile_query.to(DOT_TYPE)

        before = tl.load(seq_lens + sequence) - num_rows  # tokens that the cache had before this step
        position = before + row
        oldest = 0
        if sliding_window > 0:
            oldest = tl.maximum(before + first_row - sliding_window + 1, 0) // TOKENS * TOKENS
        newest = before + tl.minimum(first_row + ROWS, num_rows)  # one past it
        table = block_tables + sequence.to(tl.int64) * block_table_stride
        keys = key_cache + kv_head * key_head_stride
        values = value_cache + kv_head * value_head_stride

        if SEGMENT == 0:
            length = tl.cdiv(tl.cdiv(newest - oldest, num_splits), TOKENS) * TOKENS
            first = oldest + split * length
            peak, total, acc = attend(
                tile_query, keys, values, table, first, tl.minimum(first + length, newest), position,
                sliding_window, scale, key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
                HEAD_DIM, PADDED_DIM, BLOCK_SIZE, LANES, TOKENS, DOT_TYPE,
            )  # fmt: skip
        else:
            peak = tl.full((LANES,), float("-inf"), tl.float32)
            total = tl.zeros((LANES,), tl.float32)
            acc = tl.zeros((LANES, PADDED_DIM), tl.float32)
            segment, end = oldest // SEGMENT, tl.cdiv(newest, SEGMENT)
            if num_splits > 1:
                segment, end = tl.maximum(segment, split), tl.minimum(end, split + 1)
            for piece in range(segment, end):
                first = tl.maximum(piece * SEGMENT, oldest)
                piece_peak, piece_total, piece_acc = attend(
                    tile_query, keys, values, table, first, tl.minimum((piece + 1) * SEGMENT, newest), position,
                    sliding_window, scale, key_block_stride, key_slot_stride, value_block_stride, value_slot_stride,
                    HEAD_DIM, PADDED_DIM, BLOCK_SIZE, LANES, TOKENS, DOT_TYPE,
                )  # fmt: skip
                peak, keep, add = weigh(peak, piece_peak)
                total = total * keep + piece_total * add
                acc = acc * keep[:, None] + piece_acc * add[:, None]

        if num_splits == 1:
            rows = out + ((start + row) * num_heads + head).to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(rows, (acc / total[:, None]).to(out.dtype.element_ty), mask=taken[:, None] & inside[None, :])
        else:
            part = ((sequence * partial_rows + row) * num_heads + head).to(tl.int64) * num_splits + split
            tl.store(partial_stats + 2 * part, peak, mask=taken)
            tl.store(partial_stats + 2 * part + 1, total, mask=taken)
            sums = partial_out + part[:, None] * HEAD_DIM + dims[None, :]
            tl.store(sums, acc, mask=taken[:, None] & inside[None, :])


@triton.jit
def attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    position: tl.tensor,
    sliding_window: tl.tensor,
    scale: tl.tensor,
    key_block_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
):
    """The tile's lanes over the tokens first .. end: largest score (base 2), sum of weights, weighted sum of values.

    A lane that sees none of them has -inf, 0 and 0; further tokens that it does not see change no bit of its sums.
    """
    dims = tl.arange(0, PADDED_DIM)
    inside = dims < HEAD_DIM
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, PADDED_DIM), tl.float32)
    for begin in range(first, end, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        cached = token < end  # what lies in the slots and table entries behind is undefined, and may be NaN
        block = tl.load(table + token // BLOCK_SIZE, mask=cached, other=0).to(tl.int64)
        slot = token % BLOCK_SIZE

        place = keys + (block * key_block_stride + slot * key_slot_stride)[None, :] + dims[:, None]
        key = tl.load(place, mask=cached[None, :] & inside[:, None], other=0.0).to(DOT_TYPE)
        scores = tl.dot(query, key, input_precision="ieee") * scale
        visible = cached[None, :] & (token[None, :] <= position[:, None])
        if sliding_window > 0:
            visible &= token[None, :] > position[:, None] - sliding_window
        scores = tl.where(visible, scores, float("-inf"))

        new_peak, keep, _ = weigh(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - finite(new_peak)[:, None])
        total = total * keep + tl.sum(weights, axis=1)
        place = values + (block * value_block_stride + slot * value_slot_stride)[:, None] + dims[None, :]
        value = tl.load(place, mask=cached[:, None] & inside[None, :], other=0.0).to(DOT_TYPE)
        acc = tl.dot(weights.to(DOT_TYPE), value, acc * keep[:, None], input_precision="ieee")
        peak = new_peak
    return peak, total, acc


@triton.jit(do_not_specialize=["min_query_len", "max_query_len", "num_splits", "partial_rows"])
def merge_kernel(
    out: tl.tensor,
    partial_out: tl.tensor,
    partial_stats: tl.tensor,
    query_start_loc: tl.tensor,
    min_query_len: tl.tensor,
    max_query_len: tl.tensor,
    num_splits: tl.tensor,
    partial_rows: tl.tensor,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One row and head: its splits in order."""
    sequence, row = tl.program_id(0) // partial_rows, tl.program_id(0) % partial_rows
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    start = tl.load(query_start_loc + sequence)
    num_rows = tl.load(query_start_loc + sequence + 1) - start
    if (row < num_rows) & (num_rows >= min_query_len) & (num_rows <= max_query_len):
        dims = tl.arange(0, PADDED_DIM)
        inside = dims < HEAD_DIM
        first_part = (tl.program_id(0) * num_heads + head).to(tl.int64) * num_splits
        peak, total = float("-inf"), 0.0
        acc = tl.zeros((PADDED_DIM,), tl.float32)
        for part in range(first_part, first_part + num_splits):
            part_peak, part_total = tl.load(partial_stats + 2 * part), tl.load(partial_stats + 2 * part + 1)
            part_acc = tl.load(partial_out + part * HEAD_DIM + dims, mask=inside, other=0.0)
            peak, keep, add = weigh(peak, part_peak)
            total = total * keep + part_total * add
            acc = acc * keep + part_acc * add
        place = out + ((start + row) * num_heads + head).to(tl.int64) * HEAD_DIM + dims
        tl.store(place, (acc / total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def weigh(peak: tl.tensor, other: tl.tensor):
    """The larger of two peaks, and what sums under each are to be multiplied with."""
    new_peak = tl.maximum(peak, other)
    return new_peak, tl.exp2(peak - finite(new_peak)), tl.exp2(other - finite(new_peak))


@triton.jit
def finite(peak: tl.tensor):
    """0 for the peak of no scores: -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def sequence_of(tile: tl.tensor, query_start_loc: tl.tensor, num_seqs: tl.tensor, ROWS: tl.constexpr):
    """The sequence of a tile, where sequence i begins at tile `query_start_loc[i] // ROWS + i`: tiles enough for each,
    some of them empty, without a count of rows that only the device knows."""
    low, high = 0, num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1
