"""Paged attention on CUDA cores, which take float32, mixed types and small blocks: against float64, over poison, and
bitwise the same for a row wherever it is computed."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from tests.engine.kernels.cases import DECODE, MIXED, PREFILL, assert_rounds_to, make_batch
from tests.gpu.conftest import Kernels

HEAD_DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("lengths", [DECODE, PREFILL, MIXED], ids=["decode", "prefill", "mixed"])
@pytest.mark.parametrize("heads", [(4, 4), (9, 3)])
def test_shapes_of_batches(kernels: Kernels, heads: tuple[int, int], lengths: tuple[tuple[int, int], ...]) -> None:
    batch = make_batch(lengths, heads=heads)
    assert_rounds_to(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "head_dim"),
    [(torch.float32, torch.float32, head_dim) for head_dim in HEAD_DIMS]
    + [(torch.float32, torch.bfloat16, 128)]
    + [(dtype, cache_dtype, 64) for dtype in DTYPES for cache_dtype in DTYPES if dtype != cache_dtype],
)
def test_head_dims_and_types(kernels: Kernels, dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> None:
    """Few query vectors and many: both sizes of tile."""
    for lengths in (((1, 1), (1, 150)), ((1, 70), (7, 133))):
        batch = make_batch(lengths, heads=(4, 2), head_dim=head_dim, dtype=dtype, cache_dtype=cache_dtype)
        out = kernels.attend(batch)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_rounds_to(out, batch.exact())


@pytest.mark.parametrize(("head_dim", "cache_dtype"), [(64, torch.bfloat16), (128, torch.float32)])
def test_asynchronous_copies_may_land_late(
    emulated: Kernels, monkeypatch: pytest.MonkeyPatch, head_dim: int, cache_dtype: torch.dtype
) -> None:
    """All other tests see copies land at once, which hides a missing wait; here they land as late as they may."""
    monkeypatch.setenv("QUIRE_EMULATED_COPIES", "late")
    for lengths in (((1, 1), (1, 300)), ((1, 70), (11, 283))):
        batch = make_batch(lengths, heads=(4, 2), head_dim=head_dim, cache_dtype=cache_dtype)
        assert_rounds_to(emulated.attend(batch), batch.exact())


@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_block_sizes(kernels: Kernels, block_size: int) -> None:
    batch = make_batch(((1, 70), (20, 283)), block_size=block_size)
    assert_rounds_to(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_too_small_for_tensor_cores(kernels: Kernels, dtype: torch.dtype) -> None:
    batch = make_batch(((1, 70), (20, 283)), block_size=8, dtype=dtype)
    assert_rounds_to(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("seq_len", [15, 16, 17, 31, 32, 33, 127, 128, 129, 257])
def test_lengths_at_borders_of_blocks_and_tiles(kernels: Kernels, seq_len: int) -> None:
    batch = make_batch(((1, seq_len), (3, seq_len)), heads=(4, 1))
    assert_rounds_to(kernels.attend(batch), batch.exact())


@pytest.mark.parametrize("sliding_window", [1, 5, 64, 100, 5000])
def test_sliding_window(kernels: Kernels, sliding_window: int) -> None:
    batch = make_batch(((1, 400), (20, 260), (30, 30)), heads=(4, 2))
    assert_rounds_to(kernels.attend(batch, sliding_window), batch.exact(sliding_window))


def test_large_scores_do_not_overflow(kernels: Kernels) -> None:
    batch = make_batch(((1, 300), (30, 90)))
    batch.query.mul_(100.0)  # weights are all but one-hot; scores reach the thousands
    assert_rounds_to(kernels.attend(batch), batch.exact(), slack=2e-3)


def test_a_wide_group_and_shared_blocks(kernels: Kernels) -> None:
    """71 query heads on one KV head (Falcon 7B), and two sequences on the same blocks."""
    batch = make_batch(((1, 90), (4, 90)), heads=(71, 1))
    batch.metadata.block_tables[1] = batch.metadata.block_tables[0]
    assert_rounds_to(kernels.attend(batch), batch.exact())


def test_rows_of_no_sequence_are_zero(kernels: Kernels) -> None:
    """A sequence without rows is skipped, whatever its table; rows past the last sequence come out zero."""
    batch = make_batch(((2, 20), (1, 30), (30, 40)))
    starts = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    lens = torch.tensor([20, 0, 11], dtype=torch.int32)
    batch.metadata.query_start_loc.copy_(starts)
    batch.metadata.seq_lens.copy_(lens)
    batch.metadata.block_tables[1] = 1 << 30
    out = kernels.attend(batch)
    assert (out[3:] == 0.0).all()
    assert_rounds_to(out, batch.exact())


@pytest.mark.parametrize(
    ("head_dim", "cache_dtype", "sliding_window"),
    [(64, torch.float32, None), (80, torch.bfloat16, 90), (256, torch.float32, None)],  # four, four and one warp a CTA
)
def test_a_row_is_bitwise_the_same_alone_in_a_batch_and_in_chunks(
    kernels: Kernels, head_dim: int, cache_dtype: torch.dtype, sliding_window: int | None
) -> None:
    lengths = ((20, 200), (1, 233), (9, 9), (1, 64))
    batch = make_batch(lengths, heads=(2, 1), head_dim=head_dim, cache_dtype=cache_dtype)
    whole = kernels.attend(batch, sliding_window)
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, _) in enumerate(lengths):
        for chunk in (1, 7):
            for first in range(0, num_rows, chunk if chunk > 1 else 19):
                last = min(first + chunk, num_rows)
                part = kernels.attend(batch.only(seq, first, last), sliding_window)
                assert torch.equal(part, whole[starts[seq] + first : starts[seq] + last]), (seq, first, last)


def test_refuses_what_it_has_no_kernel_for(kernels: Kernels) -> None:
    with pytest.raises(KernelError, match="head_dim=32; the CUDA kernels have 64, 80, 96, 128 and 256"):
        kernels.attend(make_batch(DECODE, head_dim=32))
    with pytest.raises(KernelError, match="num_heads=6 must be a positive multiple of num_kv_heads=4"):
        kernels.attend(make_batch(DECODE, heads=(6, 4)))
    batch = make_batch(DECODE)
    with pytest.raises(KernelError, match="block_size=12 must be a power of two"):
        kernels.backend.paged_attention(
            batch.query.to(kernels.device),
            batch.key_cache.to(kernels.device)[:, :, :12],
            batch.value_cache.to(kernels.device)[:, :, :12],
            kernels.metadata(batch.metadata),
            batch.scale,
        )
    shifted = torch.zeros(batch.key_cache.numel() + 1, device=kernels.device)[1:].view(batch.key_cache.shape)
    with pytest.raises(KernelError, match=r"key_cache must start, and stride .* at multiples of 16 bytes"):
        kernels.backend.paged_attention(
            batch.query.to(kernels.device), shifted, shifted, kernels.metadata(batch.metadata), batch.scale
        )
