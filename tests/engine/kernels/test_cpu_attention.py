"""Paged attention on the CPU: against float64, over poison, and bitwise the same for a row wherever it is computed."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.backend import AttentionMetadata
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelError
from tests.engine.kernels.cases import DECODE, MIXED, PREFILL, PagedBatch, assert_rounds_to, make_batch

HEADS = ((4, 4), (8, 2), (9, 3))
HEAD_DIMS = (2, 64, 80, 96, 128, 256)
BLOCK_SIZES = (1, 8, 16, 32, 256)


def attend(backend: CpuBackend, batch: PagedBatch, sliding_window: int | None = None) -> torch.Tensor:
    return backend.paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.metadata, batch.scale, sliding_window
    )


@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("heads", HEADS)
def test_shapes_of_batches(backend: CpuBackend, heads: tuple[int, int], lengths: tuple[tuple[int, int], ...]) -> None:
    batch = make_batch(lengths, heads=heads)
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_head_dims_and_block_sizes(backend: CpuBackend, block_size: int, head_dim: int) -> None:
    batch = make_batch(((1, 70), (20, 83)), heads=(6, 2), head_dim=head_dim, block_size=block_size)
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.parametrize("head_dim", [80, 128])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types(backend: CpuBackend, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    batch = make_batch(MIXED, head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype)
    out = attend(backend, batch)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_rounds_to(out, batch.exact())


@pytest.mark.parametrize("seq_len", [15, 16, 17, 63, 64, 65, 511, 512, 513, 1025])
def test_lengths_at_borders_of_blocks_tiles_and_segments(backend: CpuBackend, seq_len: int) -> None:
    batch = make_batch(((1, seq_len), (3, seq_len)), heads=(4, 1))
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.parametrize("sliding_window", [1, 5, 64, 100, 5000])
def test_sliding_window(backend: CpuBackend, sliding_window: int) -> None:
    batch = make_batch(((1, 700), (60, 660), (150, 150)))
    assert_rounds_to(attend(backend, batch, sliding_window), batch.exact(sliding_window))


def test_large_scores_do_not_overflow(backend: CpuBackend) -> None:
    batch = make_batch(((1, 300), (30, 90)))
    batch.query.mul_(100.0)  # weights are all but one-hot; scores reach the thousands
    assert_rounds_to(attend(backend, batch), batch.exact(), slack=2e-3)


def test_equal_values_come_out_exactly(backend: CpuBackend) -> None:
    batch = make_batch(((1, 200), (40, 130)))
    batch.value_cache.nan_to_num_(nan=float("nan")).mul_(0.0).add_(1.0)
    assert_rounds_to(attend(backend, batch), torch.ones_like(batch.query, dtype=torch.float64), slack=1e-6)


def test_a_wide_group_and_shared_blocks(backend: CpuBackend) -> None:
    """71 query heads on one KV head (Falcon 7B), and two sequences on the same blocks."""
    batch = make_batch(((1, 90), (4, 90)), heads=(71, 1))
    batch.metadata.block_tables[1] = batch.metadata.block_tables[0]
    assert_rounds_to(attend(backend, batch), batch.exact())


def test_rows_of_no_sequence_are_zero(backend: CpuBackend) -> None:
    """A sequence without rows is skipped, whatever its table; rows past the last sequence come out zero."""
    batch = make_batch(((2, 20), (1, 30), (3, 40)))
    metadata = batch.metadata._replace(
        query_start_loc=torch.tensor([0, 2, 2, 3], dtype=torch.int32),
        seq_lens=torch.tensor([20, 0, 31], dtype=torch.int32),
        block_tables=batch.metadata.block_tables[[0, 1, 2]],
    )
    metadata.block_tables[1] = -1
    out = backend.paged_attention(batch.query, batch.key_cache, batch.value_cache, metadata, batch.scale)
    assert (out[3:] == 0.0).all()
    assert out[:3].isfinite().all()
    assert (out[:3] != 0.0).any(dim=-1).all()


@pytest.mark.parametrize("sliding_window", [None, 90])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_a_row_is_bitwise_the_same_alone_in_a_batch_and_in_chunks(
    backend: CpuBackend, head_dim: int, cache_dtype: torch.dtype, sliding_window: int | None
) -> None:
    lengths = ((150, 700), (1, 1100), (9, 9), (1, 64))
    batch = make_batch(lengths, heads=(9, 3), head_dim=head_dim, cache_dtype=cache_dtype)
    whole = attend(backend, batch, sliding_window)
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, _) in enumerate(lengths):
        for chunk in (1, 7, 64):
            for first in range(0, num_rows, chunk if chunk > 1 else 29):
                last = min(first + chunk, num_rows)
                part = attend(backend, batch.only(seq, first, last), sliding_window)
                assert torch.equal(part, whole[starts[seq] + first : starts[seq] + last]), (seq, first, last)


def test_a_row_is_bitwise_the_same_on_any_number_of_threads(backend: CpuBackend) -> None:
    """Two and three threads share out the segments of so few items; one runs them in line."""
    for lengths in (((1, 2500),), ((3, 1300), (1, 900)), PREFILL):
        batch = make_batch(lengths, heads=(4, 2))
        outs = [attend(CpuBackend(num_threads), batch) for num_threads in (1, 2, 3)]
        assert_rounds_to(outs[0], batch.exact())
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        for _ in range(10):
            assert torch.equal(attend(backend, batch), outs[0])


def test_a_row_does_not_depend_on_where_its_blocks_lie(backend: CpuBackend) -> None:
    batch = make_batch(MIXED, seed=1)
    order = torch.randperm(len(batch.key_cache))
    metadata = batch.metadata
    tables = metadata.block_tables.clone()
    used = tables < len(order)
    tables[used] = order.argsort()[tables[used].long()].int()
    moved = PagedBatch(
        batch.query,
        batch.key_cache[order],
        batch.value_cache[order],
        metadata._replace(block_tables=tables),
        batch.scale,
    )
    assert torch.equal(attend(backend, moved), attend(backend, batch))


def test_block_size_does_not_change_a_bit(backend: CpuBackend) -> None:
    batch = make_batch(MIXED, block_size=16)
    coarse = make_batch(MIXED, block_size=64)
    for (_, seq_len), fine_table, table in zip(
        MIXED, batch.metadata.block_tables, coarse.metadata.block_tables, strict=True
    ):
        position = torch.arange(seq_len)
        fine, block = fine_table[position // 16].long(), table[position // 64].long()
        coarse.key_cache[block, :, position % 64] = batch.key_cache[fine, :, position % 16]
        coarse.value_cache[block, :, position % 64] = batch.value_cache[fine, :, position % 16]
    coarse.query.copy_(batch.query)
    assert torch.equal(attend(backend, coarse), attend(backend, batch))


def with_metadata(batch: PagedBatch, **fields: object) -> AttentionMetadata:
    return batch.metadata._replace(**fields)  # type: ignore[arg-type]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_refuses_metadata_that_does_not_fit(cpu: CpuBackend) -> None:
    batch = make_batch(((2, 20), (1, 30)))
    tables = batch.metadata.block_tables
    for fields, message in (
        ({"query_start_loc": int32(1, 2, 3)}, r"query_start_loc\[0\]=1"),
        ({"query_start_loc": int32(0, 2, 1)}, "query_start_loc=1 must be from 2 to 3"),
        ({"query_start_loc": int32(0, 2, 4)}, "query_start_loc=4"),
        ({"query_start_loc": int32(0, 3)}, "query_start_loc 2 entries"),
        ({"seq_lens": int32(1, 30)}, "seq_lens=1 must be from 2"),
        ({"seq_lens": int32(20, 31)}, "seq_lens=31"),
        ({"max_seq_len": 29}, "seq_lens=30"),
        ({"max_query_len": 1}, "rows of a sequence=2"),
        ({"block_tables": tables.clone().fill_(len(batch.key_cache))}, "block_tables="),
        ({"block_tables": tables.clone().fill_(-1)}, "block_tables=-1"),
        ({"block_tables": tables[:1]}, "block_tables 1 rows"),
        ({"block_tables": tables.long()}, "block_tables is torch.int64"),
        ({"positions": batch.metadata.positions[:2]}, "positions has 2 rows"),
        ({"slot_mapping": torch.arange(4), "positions": torch.arange(4)}, "query has 3 rows, slot_mapping has 4"),
    ):
        with pytest.raises(KernelError, match=message):
            cpu.paged_attention(
                batch.query, batch.key_cache, batch.value_cache, with_metadata(batch, **fields), batch.scale
            )
    assert_rounds_to(attend(cpu, batch), batch.exact())  # a refused call leaves nothing behind


def test_refuses_tensors_that_do_not_fit(cpu: CpuBackend) -> None:
    batch = make_batch(((2, 20), (1, 30)), heads=(6, 4), block_size=16)
    with pytest.raises(KernelError, match="num_heads=6 is no multiple of num_kv_heads=4"):
        attend(cpu, batch)
    batch = make_batch(((2, 20), (1, 30)))
    keys, values = batch.key_cache, batch.value_cache
    for query, key_cache, value_cache, message in (
        (batch.query[..., :32], keys, values, r"both must be \[num_blocks, num_kv_heads, block_size, 32\]"),
        (batch.query, keys, values[:1], "value_cache"),
        (batch.query, keys, values.bfloat16(), "value_cache is torch.bfloat16"),
        (batch.query, keys.half(), values.half(), "cache_dtype is float16"),
        (batch.query, keys.double(), values.double(), "key_cache is torch.float64"),
        (batch.query[..., ::2], keys, values, "query has stride 2"),
        (batch.query.flatten(1), keys, values, "query has shape"),
        (batch.query, keys[:, :, :12], values[:, :, :12], "block_size=12 is no power of two"),
    ):
        with pytest.raises(KernelError, match=message):
            cpu.paged_attention(query, key_cache, value_cache, batch.metadata, batch.scale)
    with pytest.raises(KernelError, match="sliding_window=0"):
        attend(cpu, batch, sliding_window=0)
