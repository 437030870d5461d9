"""Run a model over a paged cache whose blocks lie in random order and start as NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.backend import AttentionMetadata
from engine.models import CausalLM


class PagedRunner:
    """A cache for a few sequences, and steps that append chunks of tokens to them."""

    def __init__(self, model: CausalLM, num_seqs: int, max_len: int, block_size: int = 4) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.blocks_per_seq = -(-max_len // block_size)
        num_blocks = num_seqs * self.blocks_per_seq + 3
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        self.kv_pool = torch.full(shape, float("nan"))
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))
        self.tables = order[: num_seqs * self.blocks_per_seq].view(num_seqs, -1).int()
        self.lengths = [0] * num_seqs

    def step(self, chunks: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Append one chunk to each sequence (perhaps an empty one); logits of all its rows, a tensor a sequence."""
        active = [i for i, chunk in enumerate(chunks) if chunk]
        positions, slots, starts = [], [], [0]
        for i in active:
            for position in range(self.lengths[i], self.lengths[i] + len(chunks[i])):
                block = int(self.tables[i, position // self.block_size])
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
            self.lengths[i] += len(chunks[i])
            starts.append(len(positions))
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor([self.lengths[i] for i in active], dtype=torch.int32),
            block_tables=self.tables[active],
            slot_mapping=torch.tensor(slots),
            positions=torch.tensor(positions),
            max_query_len=max(len(chunks[i]) for i in active),
            max_seq_len=max(self.lengths[i] for i in active),
        )
        ids = torch.tensor([token for i in active for token in chunks[i]])
        logits = self.model.compute_logits(self.model.forward(ids, self.kv_pool, metadata))
        parts = iter(torch.split(logits, [len(chunks[i]) for i in active]))
        return [next(parts) if chunk else logits[:0] for chunk in chunks]


def prompt_logits(model: CausalLM, ids: Sequence[int], chunk_sizes: Sequence[int] | None = None) -> torch.Tensor:
    """Logits of every position of one prompt, in one step or in chunks."""
    runner = PagedRunner(model, num_seqs=1, max_len=len(ids))
    rows, start = [], 0
    for size in chunk_sizes or [len(ids)]:
        rows += runner.step([ids[start : start + size]])
        start += size
    assert start == len(ids)
    return torch.cat(rows)
