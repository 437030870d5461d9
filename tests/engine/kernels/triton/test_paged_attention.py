"""Paged attention in Triton's interpreter: against float64, over poison, and bitwise the same wherever a row is
computed. bfloat16 is left to GPUs: the interpreter multiplies its bits as integers."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from tests.engine.kernels.cases import PagedBatch, assert_rounds_to, make_batch
from tests.engine.kernels.triton.interpreter import InterpretedBackend

# The interpreter takes seconds for a call: every change is tested with one case of each kind, the others are slow.
SLOW = [pytest.mark.slow]
BATCHES = {
    "decode": ((1, 1), (1, 7), (1, 213)),
    "prefill": ((37, 37), (5, 5), (3, 16), (34, 131)),
    "mixed": ((40, 141), (1, 123), (9, 64)),
}


def attend(backend: InterpretedBackend, batch: PagedBatch, sliding_window: int | None = None) -> torch.Tensor:
    return backend.paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.metadata, batch.scale, sliding_window
    )


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """float16: weights are rounded for the second product, so that errors are relative to the row's largest value."""
    error = (actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert error.max() < 1e-3


@pytest.mark.parametrize(
    "lengths",
    [pytest.param(lengths, id=name, marks=[] if name == "mixed" else SLOW) for name, lengths in BATCHES.items()],
)
def test_shapes_of_batches(backend: InterpretedBackend, lengths: tuple[tuple[int, int], ...]) -> None:
    batch = make_batch(lengths, heads=(6, 2), head_dim=32)
    assert_rounds_to(attend(backend, batch), batch.exact())
    batch = make_batch(lengths, heads=(2, 2), head_dim=32, dtype=torch.float16)
    assert_close(attend(backend, batch), batch.exact())


@pytest.mark.parametrize("head_dim", [80, *(pytest.param(dim, marks=SLOW) for dim in (2, 128, 256))])
def test_head_dims(backend: InterpretedBackend, head_dim: int) -> None:
    for dtype, check in ((torch.float16, assert_close), (torch.float32, assert_rounds_to)):
        batch = make_batch(((1, 70), (20, 33)), heads=(4, 2), head_dim=head_dim, dtype=dtype)
        out = attend(backend, batch)
        assert out.dtype == dtype
        assert out.is_contiguous()
        check(out, batch.exact())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_another_type_in_the_cache(backend: InterpretedBackend, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Products are of float32 then, and lose nothing."""
    batch = make_batch(((1, 70), (20, 33)), heads=(4, 2), head_dim=32, dtype=dtype, cache_dtype=cache_dtype)
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 256])
def test_block_sizes(backend: InterpretedBackend, block_size: int) -> None:
    batch = make_batch(((1, 70), (20, 283)), heads=(4, 2), head_dim=16, block_size=block_size)
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [33, 512, 513])
def test_lengths_at_borders_of_tiles_splits_and_segments(backend: InterpretedBackend, seq_len: int) -> None:
    """One KV head and two sequences: the decode is split."""
    batch = make_batch(((1, seq_len), (1, 40)), heads=(4, 1), head_dim=16)
    assert_rounds_to(attend(backend, batch), batch.exact())
    batch = make_batch(((23, seq_len),), heads=(4, 1), head_dim=16)
    assert_rounds_to(attend(backend, batch), batch.exact())


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [1, 100])
def test_sliding_window(backend: InterpretedBackend, sliding_window: int) -> None:
    batch = make_batch(((1, 530), (20, 130), (30, 30)), heads=(4, 2), head_dim=16)
    assert_rounds_to(attend(backend, batch, sliding_window), batch.exact(sliding_window))
    alone = make_batch(((1, 600),), heads=(4, 1), head_dim=16)
    assert_rounds_to(attend(backend, alone, sliding_window), alone.exact(sliding_window))


@pytest.mark.slow
def test_large_scores_do_not_overflow(backend: InterpretedBackend) -> None:
    batch = make_batch(((1, 300), (30, 90)), heads=(4, 2), head_dim=32)
    batch.query.mul_(100.0)  # weights are all but one-hot; scores reach the thousands
    assert_rounds_to(attend(backend, batch), batch.exact(), slack=2e-3)


@pytest.mark.slow
def test_a_wide_group_and_shared_blocks(backend: InterpretedBackend) -> None:
    """71 query heads on one KV head (Falcon 7B), and two sequences on the same blocks."""
    batch = make_batch(((1, 90), (4, 90)), heads=(71, 1), head_dim=16)
    batch.metadata.block_tables[1] = batch.metadata.block_tables[0]
    assert_rounds_to(attend(backend, batch), batch.exact())


def test_rows_of_no_sequence_are_zero(backend: InterpretedBackend) -> None:
    """A sequence without rows is skipped, whatever its table; rows past the last sequence come out zero."""
    batch = make_batch(((2, 20), (1, 30), (30, 40)), heads=(4, 2), head_dim=16)
    batch.metadata.query_start_loc.copy_(torch.tensor([0, 2, 2, 3]))
    batch.metadata.seq_lens.copy_(torch.tensor([20, 0, 11]))
    batch.metadata.block_tables[1] = 1 << 30
    for max_query_len in (2, 30):  # one tile a sequence, and tiles that are looked up
        out = backend.paged_attention(
            batch.query,
            batch.key_cache,
            batch.value_cache,
            batch.metadata._replace(max_query_len=max_query_len),
            batch.scale,
        )
        assert (out[3:] == 0.0).all()
        assert_rounds_to(out, batch.exact())


@pytest.mark.parametrize(
    ("dtype", "sliding_window"), [(torch.float16, None), pytest.param(torch.float32, 600, marks=SLOW)]
)
def test_a_row_is_bitwise_the_same_alone_in_a_batch_and_in_chunks(
    invariant: InterpretedBackend, dtype: torch.dtype, sliding_window: int | None
) -> None:
    """Alone a decode's segments are split over programs, in a chunk one program does them all."""
    lengths = ((40, 1100), (1, 900), (9, 9))
    batch = make_batch(lengths, heads=(2, 1), head_dim=16, dtype=dtype)
    whole = attend(invariant, batch, sliding_window)
    starts = batch.metadata.query_start_loc.tolist()
    for seq, first, last in ((0, 0, 1), (0, 17, 18), (0, 39, 40), (0, 3, 10), (0, 0, 35), (1, 0, 1), (2, 8, 9)):
        part = attend(invariant, batch.only(seq, first, last), sliding_window)
        assert torch.equal(part, whole[starts[seq] + first : starts[seq] + last]), (seq, first, last)


def test_refuses_what_does_not_fit(backend: InterpretedBackend) -> None:
    with pytest.raises(KernelError, match="num_heads=6 must be a positive multiple of num_kv_heads=4"):
        attend(backend, make_batch(((1, 9),), heads=(6, 4), head_dim=16))
    batch = make_batch(((1, 9),), heads=(4, 2), head_dim=16)
    with pytest.raises(KernelError, match="query has stride 2"):
        backend.paged_attention(batch.query[..., ::2], batch.key_cache, batch.value_cache, batch.metadata, batch.scale)
    with pytest.raises(KernelError, match="sliding_window=0"):
        attend(backend, batch, sliding_window=0)
    metadata = batch.metadata._replace(seq_lens=batch.metadata.seq_lens.long())
    with pytest.raises(KernelError, match=r"seq_lens is torch\.int64"):
        backend.paged_attention(batch.query, batch.key_cache, batch.value_cache, metadata, batch.scale)
