"""Paged attention on tensor cores: against float64, over poison, however it is shared out over CTAs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from engine.kernels.backend import AttentionMetadata
from engine.kernels.library import KernelError
from engine.kernels.native import NativeBackend
from tests.engine.kernels.cases import DECODE, MIXED, PREFILL, PagedBatch, assert_attends, make_batch
from tests.gpu.conftest import EmulatedBackend, Kernels

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3), (20, 2)])  # groups of 1, 3 and 10
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_batches(
    kernels: Kernels, dtype: torch.dtype, heads: tuple[int, int], lengths: tuple[tuple[int, int], ...]
) -> None:
    batch = make_batch(lengths, heads=heads, dtype=dtype)
    out = kernels.attend(batch)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_attends(out, batch.exact())


@pytest.mark.parametrize("heads", [(8, 2), (32, 2)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(kernels: Kernels, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    """Columns of 8 vectors and of 16; tiles of four warps and of eight."""
    for lengths in (((1, 1), (1, 150)), ((70, 70), (3, 133)), ((5, 90), (1, 40))):
        batch = make_batch(lengths, heads=heads, head_dim=head_dim, dtype=dtype)
        assert_attends(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_asynchronous_copies_may_land_late(emulated: Kernels, monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    """All other tests see copies land at once, which hides a missing wait; here they land as late as they may."""
    monkeypatch.setenv("QUIRE_EMULATED_COPIES", "late")
    for lengths in (((1, 1), (1, 500), (1, 90)), ((1, 70), (40, 283))):
        batch = make_batch(lengths, heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16)
        assert_attends(emulated.attend(batch), batch.exact())


@pytest.mark.parametrize("block_size", [16, 32, 256])
def test_block_sizes(kernels: Kernels, block_size: int) -> None:
    batch = make_batch(((1, 300), (20, 283), (1, 33)), block_size=block_size, dtype=torch.bfloat16)
    assert_attends(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_lengths_at_borders_of_blocks_and_tiles(kernels: Kernels, seq_len: int) -> None:
    batch = make_batch(((1, seq_len), (min(3, seq_len), seq_len)), heads=(4, 1), dtype=torch.float16)
    assert_attends(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("sliding_window", [1, 5, 64, 100, 5000])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_sliding_window(kernels: Kernels, head_dim: int, sliding_window: int) -> None:
    batch = make_batch(((1, 400), (70, 260), (30, 30), (1, 64)), heads=(4, 2), head_dim=head_dim, dtype=torch.float16)
    assert_attends(kernels.attend(batch, sliding_window), batch.exact(sliding_window))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = make_batch(((1, 300), (30, 90)), dtype=dtype)
    batch.query.mul_(100.0)  # weights are all but one-hot; scores reach the thousands
    assert_attends(kernels.attend(batch), batch.exact())


def test_a_wide_group_and_shared_blocks(kernels: Kernels) -> None:
    """71 query heads on one KV head (Falcon 7B), and two sequences on the same blocks."""
    batch = make_batch(((1, 90), (4, 90), (1, 90)), heads=(71, 1), dtype=torch.bfloat16)
    batch.metadata.block_tables[1:] = batch.metadata.block_tables[0]
    assert_attends(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("fixed_splits", [False, True])
def test_rows_of_no_sequence_are_zero(kernels: Kernels, invariant_kernels: Kernels, fixed_splits: bool) -> None:
    """Sequences without rows are skipped, whatever their tables; rows past the last sequence come out zero."""
    batch = make_batch(((1, 20), (1, 30), (3, 50), (30, 40)), dtype=torch.bfloat16)
    batch.metadata.query_start_loc.copy_(torch.tensor([0, 1, 1, 4, 4], dtype=torch.int32))
    batch.metadata.seq_lens.copy_(torch.tensor([20, 0, 50, 0], dtype=torch.int32))
    batch.metadata.block_tables[1] = 1 << 30
    out = (invariant_kernels if fixed_splits else kernels).attend(batch)
    assert (out[4:] == 0.0).all()
    assert_attends(out, batch.exact())


def test_many_sequences(kernels: Kernels) -> None:
    """More than a warp has lanes to add lengths up, among them prompts and sequences without rows."""
    lengths = [(1, 1 + 7 * i % 90) if i % 9 else (3, 20 + i) for i in range(70)]
    batch = make_batch(lengths, heads=(2, 1), dtype=torch.float16)
    assert_attends(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("processors", [1, 3, 40])
@pytest.mark.parametrize("lengths", [((1, 900), (1, 20), (1, 333)), ((9, 1500),), ((1, 700), (2, 1200))])
def test_any_number_of_processors(
    emulated: Kernels, monkeypatch: pytest.MonkeyPatch, lengths: tuple[tuple[int, int], ...], processors: int
) -> None:
    """From a CTA for all sequences of a KV head to many for each; a prompt's tokens are split where it is short."""
    monkeypatch.setenv("QUIRE_EMULATED_PROCESSORS", str(processors))
    batch = make_batch(lengths, heads=(4, 2), dtype=torch.float16)
    for window in (None, 300):
        assert_attends(emulated.attend(batch, window), batch.exact(window))


def test_launches_follow_upper_bounds(kernels: Kernels) -> None:
    """As a graph replays them: grids and workspace for the longest sequences, whatever the lengths are then."""
    batch = make_batch(((1, 60), (1, 7), (1, 200)), dtype=torch.bfloat16)
    tables = torch.full((3, 500), 1 << 30, dtype=torch.int32)
    tables[:, : batch.metadata.block_tables.shape[1]] = batch.metadata.block_tables
    for max_query_len in (1, 64):
        metadata = batch.metadata._replace(block_tables=tables, max_seq_len=8000, max_query_len=max_query_len)
        assert_attends(kernels.attend(dataclasses.replace(batch, metadata=metadata)), batch.exact())


@pytest.mark.parametrize(("head_dim", "sliding_window"), [(64, None), (80, 90), (256, None)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_with_fixed_splits_a_row_is_bitwise_the_same_alone_in_a_batch_and_in_chunks(
    invariant_kernels: Kernels, dtype: torch.dtype, head_dim: int, sliding_window: int | None
) -> None:
    lengths = ((20, 200), (1, 333), (9, 9), (1, 64), (150, 400))
    batch = make_batch(lengths, heads=(2, 1), head_dim=head_dim, dtype=dtype)
    whole = invariant_kernels.attend(batch, sliding_window)
    assert_attends(whole, batch.exact(sliding_window))
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, _) in enumerate(lengths):
        for chunk in (1, 7, 100):
            for first in range(0, num_rows, chunk if chunk > 7 else 37):
                last = min(first + chunk, num_rows)
                part = invariant_kernels.attend(batch.only(seq, first, last), sliding_window)
                assert torch.equal(part, whole[starts[seq] + first : starts[seq] + last]), (seq, first, last)


@pytest.mark.parametrize(
    "lengths", [((9, 130), (1, 100), (10, 70)), ((1, 70),) * 7 + ((1, 200), (1, 30)) * 4], ids=["mixed", "decodes"]
)
def test_partial_results_take_bounded_memory(emulated: Kernels, lengths: tuple[tuple[int, int], ...]) -> None:
    """Seven rows a launch, as the longest sequence there may be has 64 splits here; and the bits of a row alone."""
    kernels = Kernels(EmulatedBackend(emulated.native.library.path, split_tokens=64), "cpu")
    batch = make_batch(lengths, heads=(64, 1), head_dim=256, dtype=torch.bfloat16)
    tables = torch.full((len(lengths), 256), 1 << 30, dtype=torch.int32)
    tables[:, : batch.metadata.block_tables.shape[1]] = batch.metadata.block_tables
    metadata = batch.metadata._replace(block_tables=tables, max_seq_len=4096)
    whole = kernels.attend(dataclasses.replace(batch, metadata=metadata))
    assert isinstance(kernels.backend, EmulatedBackend)
    assert 28 << 20 < kernels.backend._workspace.nbytes <= 32 << 20
    assert_attends(whole, batch.exact())
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, _) in enumerate(lengths):
        alone = kernels.attend(batch.only(seq, 0, num_rows))
        assert torch.equal(alone, whole[starts[seq] : starts[seq + 1]]), seq


def test_the_same_batch_gives_the_same_bits(kernels: Kernels) -> None:
    batch = make_batch(MIXED, heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    first = kernels.attend(batch)
    for _ in range(3):
        assert torch.equal(kernels.attend(batch), first)


def test_refuses_a_workspace_that_is_too_small(emulated: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        emulated.backend, "_attach_workspace", NativeBackend._attach_workspace.__get__(emulated.backend)
    )
    with pytest.raises(KernelError, match="workspace_bytes=0 must be 16-byte aligned and have"):
        emulated.attend(make_batch(DECODE, dtype=torch.bfloat16))


def test_refuses_splits_of_part_of_a_tile(emulated: Kernels) -> None:
    backend = EmulatedBackend(emulated.native.library.path, split_tokens=100)
    with pytest.raises(KernelError, match="split_tokens=100 must be 0 or a positive multiple of 64"):
        Kernels(backend, "cpu").attend(make_batch(DECODE))


# Shapes that only a GPU computes in reasonable time, from vLLM's and FlashInfer's tests.
LONG = {
    "decode": ((1, 213), (1, 1), (1, 312), (1, 7), (1, 7812)),
    "prefill": ((2345, 2345), (5, 5), (3, 16), (134, 5131)),
    "mixed": ((992, 2456), (1, 1234), (98, 1145), (1, 4162)),
    "ragged": ((1, 32767), (1, 54), (1, 97), (1, 16384), (1, 2048), (1, 99), (1, 1763), (1, 9999)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LONG.values(), ids=LONG)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((64, 8), 128), ((40, 40), 128), ((9, 3), 64)])
def test_long_sequences(
    heads: tuple[int, int], head_dim: int, block_size: int, lengths: tuple[tuple[int, int], ...]
) -> None:
    from engine.kernels.cuda import CudaBackend

    batch = make_batch(lengths, heads=heads, head_dim=head_dim, block_size=block_size, dtype=torch.bfloat16)
    on_gpu = dataclasses.replace(
        batch,
        query=batch.query.cuda(),
        key_cache=batch.key_cache.cuda(),
        value_cache=batch.value_cache.cuda(),
        metadata=Kernels(CudaBackend(), "cuda").metadata(batch.metadata),
    )
    exact = on_gpu.exact().cpu()  # in float64, which takes a CPU seconds
    for batch_invariant in (False, True):
        out = Kernels(CudaBackend(batch_invariant), "cuda").attend(batch)
        assert_attends(out, exact)


@pytest.mark.gpu
def test_blocks_beyond_two_to_the_31_elements() -> None:
    """A pool of 2 MiB blocks as Llama-8B has it, with all sequences at its far end."""
    from engine.kernels.cuda import CudaBackend

    batch = make_batch(MIXED, heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    num_blocks = batch.key_cache.shape[0]
    pool = torch.empty(2500 + num_blocks, 32, 2, 8, 16, 128, dtype=torch.bfloat16, device="cuda")
    pool[2500:, 31, 0] = batch.key_cache.cuda()
    pool[2500:, 31, 1] = batch.value_cache.cuda()
    kernels = Kernels(CudaBackend(), "cuda")
    metadata = kernels.metadata(batch.metadata)
    moved = metadata._replace(block_tables=metadata.block_tables + 2500)
    out = kernels.backend.paged_attention(
        batch.query.cuda().contiguous(), pool[:, 31, 0], pool[:, 31, 1], moved, batch.scale
    )
    assert_attends(out.cpu(), batch.exact())


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_graph_replays_on_other_lengths(batch_invariant: bool) -> None:
    """Captured once at the upper bounds; lengths, tables and queries change in place, and rows become padding."""
    from engine.kernels.cuda import CudaBackend

    backend = CudaBackend(batch_invariant)
    batches = [
        make_batch(lengths, heads=(32, 8), head_dim=128, dtype=torch.bfloat16, seed=i)
        for i, lengths in enumerate([((1, 40), (1, 900), (1, 17)), ((1, 3000), (1, 1), (1, 2047)), ((1, 5), (1, 6))])
    ]
    query = torch.zeros(3, 32, 128, dtype=torch.bfloat16, device="cuda")
    pool = torch.zeros(400, 2, 2, 8, 16, 128, dtype=torch.bfloat16, device="cuda")
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(4, dtype=torch.int32, device="cuda"),
        seq_lens=torch.ones(3, dtype=torch.int32, device="cuda"),
        block_tables=torch.zeros(3, 256, dtype=torch.int32, device="cuda"),
        slot_mapping=torch.zeros(3, dtype=torch.int64, device="cuda"),
        positions=torch.zeros(3, dtype=torch.int64, device="cuda"),
        max_query_len=1,
        max_seq_len=4096,
    )

    def attend() -> torch.Tensor:
        return backend.paged_attention(query, pool[:, 1, 0], pool[:, 1, 1], metadata, 128**-0.5)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for batch in batches:
        _fill(query, pool, metadata, batch)
        graph.replay()
        torch.cuda.synchronize()
        rows = len(batch.metadata.seq_lens)
        assert_attends(out[:rows].cpu(), batch.exact())
        assert (out[rows:] == 0.0).all()
        assert torch.equal(out, attend())


def _fill(query: torch.Tensor, pool: torch.Tensor, metadata: AttentionMetadata, batch: PagedBatch) -> None:
    rows, width = batch.metadata.block_tables.shape
    query[:rows] = batch.query.cuda()
    pool[: batch.key_cache.shape[0], 1, 0] = batch.key_cache.cuda()
    pool[: batch.key_cache.shape[0], 1, 1] = batch.value_cache.cuda()
    metadata.block_tables.fill_(1 << 30)
    metadata.block_tables[:rows, :width] = batch.metadata.block_tables.cuda()
    metadata.query_start_loc.fill_(rows)
    metadata.query_start_loc[: rows + 1] = batch.metadata.query_start_loc.cuda()
    metadata.seq_lens.fill_(0)
    metadata.seq_lens[:rows] = batch.metadata.seq_lens.cuda()
