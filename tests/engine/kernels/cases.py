"""Random batches over a paged KV cache, poisoned wherever no kernel may read, for the tests of every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.kernels.backend import AttentionMetadata
from engine.kernels.reference import ReferenceBackend

HUGE_BLOCK = 1 << 30  # a table entry past a sequence's last block: any use of it is a fault

DECODE = ((1, 1), (1, 7), (1, 213), (1, 312))
PREFILL = ((97, 97), (5, 5), (16, 16), (3, 16), (34, 131))
MIXED = ((40, 241), (1, 123), (9, 114), (1, 642))


@dataclass(frozen=True)
class PagedBatch:
    """Arguments of paged_attention. The caches are one layer's views of a pool that is NaN outside the sequences."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    metadata: AttentionMetadata
    scale: float

    def exact(self, sliding_window: int | None = None) -> torch.Tensor:
        """The answer in float64."""
        return ReferenceBackend().paged_attention(
            self.query.double(),
            self.key_cache.double(),
            self.value_cache.double(),
            self.metadata,
            self.scale,
            sliding_window,
        )

    def only(self, seq: int, first: int, last: int) -> PagedBatch:
        """Rows first .. last of one sequence as a chunk of its own, as if the tokens after them did not exist yet."""
        start, stop = self.metadata.query_start_loc[seq : seq + 2].tolist()
        rows = slice(start + first, start + last)
        seq_len = int(self.metadata.seq_lens[seq]) - (stop - start) + last
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, last - first], dtype=torch.int32),
            seq_lens=torch.tensor([seq_len], dtype=torch.int32),
            block_tables=self.metadata.block_tables[seq : seq + 1],
            slot_mapping=self.metadata.slot_mapping[rows],
            positions=self.metadata.positions[rows],
            max_query_len=last - first,
            max_seq_len=seq_len,
        )
        return dataclasses.replace(self, query=self.query[rows], metadata=metadata)


def make_metadata(lengths: Sequence[tuple[int, int]], block_size: int, num_blocks: int) -> AttentionMetadata:
    """Metadata of sequences of (rows in this step, tokens in the cache) on random blocks of the pool."""
    num_rows = [rows for rows, _ in lengths]
    needed = [-(-seq_len // block_size) for _, seq_len in lengths]
    blocks = torch.split(torch.randperm(num_blocks)[: sum(needed)], needed)
    tables = torch.full((len(lengths), max(needed) + 2), HUGE_BLOCK, dtype=torch.int32)
    slots, positions = [], []
    for i, (rows, seq_len) in enumerate(lengths):
        tables[i, : needed[i]] = blocks[i]
        position = torch.arange(seq_len - rows, seq_len)
        positions.append(position)
        slots.append(blocks[i][position // block_size] * block_size + position % block_size)
    return AttentionMetadata(
        query_start_loc=torch.tensor([0, *num_rows]).cumsum(0).int(),
        seq_lens=torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.cat(slots),
        positions=torch.cat(positions),
        max_query_len=max(num_rows),
        max_seq_len=max(seq_len for _, seq_len in lengths),
    )


def make_pool(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A pool of two layers, all NaN."""
    return torch.full((num_blocks, 2, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)


def make_batch(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> PagedBatch:
    """A batch of sequences of (rows in this step, tokens in the cache); query is a view of a fused projection."""
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    num_blocks = sum(-(-seq_len // block_size) for _, seq_len in lengths) + 3
    metadata = make_metadata(lengths, block_size, num_blocks)
    pool = make_pool(num_blocks, num_kv_heads, block_size, head_dim, cache_dtype or dtype)
    layer = pool[:, 1]
    for (_, seq_len), table in zip(lengths, metadata.block_tables, strict=True):
        position = torch.arange(seq_len)
        layer[table[position // block_size].long(), :, :, position % block_size] = torch.randn(
            seq_len, 2, num_kv_heads, head_dim
        ).to(pool.dtype)
    query = torch.randn(len(metadata.positions), num_heads + 2 * num_kv_heads, head_dim).to(dtype)[:, :num_heads]
    return PagedBatch(query, layer[:, 0], layer[:, 1], metadata, head_dim**-0.5)


def assert_rounds_to(actual: torch.Tensor, exact: torch.Tensor, slack: float = 4e-6) -> None:
    """`actual` is `exact` (float64) but for float32 arithmetic (`slack`, relative and absolute) and one rounding."""
    rounding = torch.finfo(actual.dtype).eps / 2
    torch.testing.assert_close(actual.double(), exact, rtol=rounding + slack, atol=slack)


def assert_attends(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """`actual` is `exact` (float64) but for 16-bit weights of the values and one rounding, vector by vector."""
    limit = 5e-3 if actual.dtype == torch.bfloat16 else 6e-4
    error = (actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    # Rows of no sequence are exactly zero in both: 0 / 0.
    error[(exact == 0.0).all(dim=-1) & (actual == 0.0).all(dim=-1)] = 0.0
    worst = int(error.nan_to_num(torch.inf).argmax())
    assert error.flatten()[worst] < limit, f"vector {worst} (row-major): relative error {error.flatten()[worst]:.2e}"
