"""Paged attention over the pool of all layers: the shapes that are timed, and their data."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.gpu.figures import DECODE, ONE_LAYER, PREFILL
from engine.kernels.backend import AttentionMetadata, KernelBackend

BLOCK_SIZE = 16


class AttentionCase(NamedTuple):
    """A batch of equal sequences of one model's attention shape.

    Attributes:
        num_rows: of each sequence in this step: 1 decodes, more are a prompt's chunk, its last tokens.
        num_layers: of the pool; calls take one layer after another, so that no cache holds what they read.
        has_peers: whether others are timed on it; `compiles_peers`, also those that take long to compile.
    """

    name: str
    num_seqs: int
    num_rows: int
    seq_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_layers: int = 32
    has_peers: bool = True
    compiles_peers: bool = False

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one layer, bfloat16."""
        return 2 * 2 * self.num_seqs * self.seq_len * self.num_kv_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Multiplications and additions of the visible pairs of row and token."""
        pairs = self.num_rows * self.seq_len - self.num_rows * (self.num_rows - 1) // 2
        return 4 * self.num_seqs * pairs * self.num_heads * self.head_dim

    @property
    def blocks_per_seq(self) -> int:
        return -(-self.seq_len // BLOCK_SIZE)

    @property
    def pool_bytes(self) -> int:
        return self.num_layers * self.num_seqs * self.blocks_per_seq * BLOCK_SIZE * self.kv_bytes // (
            self.num_seqs * self.seq_len
        )  # fmt: skip


CASES = (
    AttentionCase(DECODE, 64, 1, 4096, compiles_peers=True),
    AttentionCase(PREFILL, 1, 2048, 8192, compiles_peers=True),
    # The blocks of one layer, one behind the other: strides of 64 KiB, where a pool of all layers has 2 MiB.
    AttentionCase(DECODE + ONE_LAYER, 64, 1, 4096, num_layers=1, has_peers=False),
    AttentionCase("decode llama-8b 256 x 1024", 256, 1, 1024),
    AttentionCase("decode llama-8b 16 x 4096", 16, 1, 4096),
    AttentionCase("decode llama-8b 1 x 8192", 1, 1, 8192),
    AttentionCase("decode opt-13b 16 x 2048", 16, 1, 2048, 40, 40, 128, 40),
    AttentionCase("prefill llama-8b 2048 of 2048", 1, 2048, 2048),
)


class AttentionData(NamedTuple):
    """What a case computes on. The blocks of each sequence lie anywhere in the pool."""

    case: AttentionCase
    query: torch.Tensor
    pool: torch.Tensor
    metadata: AttentionMetadata

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value cache of one layer, `[num_blocks, num_kv_heads, block_size, head_dim]`, strided."""
        return self.pool[:, index, 0], self.pool[:, index, 1]

    def dense(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of one layer, `[num_seqs, num_kv_heads, seq_len, head_dim]`, contiguous."""
        tables = self.metadata.block_tables.long()
        gathered = (cache[tables].transpose(1, 2).flatten(2, 3) for cache in self.layer(index))
        key, value = (cache[:, :, : self.case.seq_len].contiguous() for cache in gathered)
        return key, value


def make_data(case: AttentionCase, device: str = "cuda") -> AttentionData:
    """Random queries, keys and values on a random permutation of the pool's blocks."""
    torch.manual_seed(0)
    num_blocks = case.num_seqs * case.blocks_per_seq
    shape = (num_blocks, case.num_layers, 2, case.num_kv_heads, BLOCK_SIZE, case.head_dim)
    pool = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for block in range(0, num_blocks, 1024):
        pool[block : block + 1024].normal_()
    num_tokens = case.num_seqs * case.num_rows
    tables = torch.randperm(num_blocks, device=device).int().view(case.num_seqs, case.blocks_per_seq)
    positions = torch.arange(case.seq_len - case.num_rows, case.seq_len, device=device)
    blocks = tables[:, positions // BLOCK_SIZE].long()
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(0, num_tokens + 1, case.num_rows, dtype=torch.int32, device=device),
        seq_lens=torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32, device=device),
        block_tables=tables,
        slot_mapping=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).flatten(),
        positions=positions.repeat(case.num_seqs),
        max_query_len=case.num_rows,
        max_seq_len=case.seq_len,
    )
    query = torch.randn(num_tokens, case.num_heads, case.head_dim, dtype=torch.bfloat16, device=device)
    return AttentionData(case, query, pool, metadata)


def attend(kernels: KernelBackend, data: AttentionData, index: int) -> torch.Tensor:
    return kernels.paged_attention(data.query, *data.layer(index), data.metadata, data.scale)
