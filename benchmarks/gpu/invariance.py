"""Batch invariance: are results the same bits alone, in a batch and in chunks?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu.attention import BLOCK_SIZE
from engine.config import CacheConfig
from engine.execution.cache_engine import CacheEngine
from engine.execution.input_batch import InputBatch
from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.loading import load_model, open_checkpoint
from engine.models import CausalLM
from engine.scheduling import ScheduledSequence, SchedulerOutput

# (rows in this step, tokens in the cache): decodes and chunks on both sides of a split of 2,048 tokens.
LENGTHS = ((1, 17), (1, 2048), (1, 2049), (1, 6000), (200, 200), (130, 4200), (64, 2100), (1, 9000))


class Stretch(NamedTuple):
    """Rows first to last of sequence `seq`, as a step of its own."""

    seq: int
    first: int
    last: int


def same_attention(
    kernels: KernelBackend,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    heads: tuple[int, int] = (32, 8),
    head_dim: int = 128,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The share of rows whose attention is the same bits in a batch, alone and in chunks."""
    torch.manual_seed(0)
    num_blocks = [-(-seq_len // BLOCK_SIZE) for _, seq_len in lengths]
    pool = torch.randn(sum(num_blocks), 2, heads[1], BLOCK_SIZE, head_dim).to(device, dtype)
    order = torch.split(torch.randperm(sum(num_blocks)).int(), num_blocks)
    query = torch.randn(sum(rows for rows, _ in lengths), heads[0], head_dim).to(device, dtype)
    starts = np.cumsum([0, *(rows for rows, _ in lengths)]).tolist()

    def attend(parts: Sequence[Stretch]) -> torch.Tensor:
        rows = [slice(starts[part.seq] + part.first, starts[part.seq] + part.last) for part in parts]
        metadata = _metadata(parts, lengths, order, device)
        values = torch.cat([query[part] for part in rows])
        return kernels.paged_attention(values, pool[:, 0], pool[:, 1], metadata, head_dim**-0.5)

    whole = attend([Stretch(seq, 0, rows) for seq, (rows, _) in enumerate(lengths)])
    same = 0
    for seq, (num_rows, _) in enumerate(lengths):
        expected = whole[starts[seq] : starts[seq + 1]]
        alone = attend([Stretch(seq, 0, num_rows)])
        cut = num_rows // 3
        chunks = [attend([Stretch(seq, first, last)]) for first, last in ((0, cut), (cut, num_rows)) if first < last]
        equal = (alone == expected) & (torch.cat(chunks) == expected)
        same += int(equal.flatten(1).all(dim=1).sum())
    return same / sum(rows for rows, _ in lengths)


def _metadata(
    parts: Sequence[Stretch], lengths: Sequence[tuple[int, int]], blocks: Sequence[torch.Tensor], device: str
) -> AttentionMetadata:
    """Of a step with these stretches, the tokens behind each of which do not exist yet."""
    ends = [lengths[part.seq][1] - lengths[part.seq][0] + part.last for part in parts]
    rows = [part.last - part.first for part in parts]
    width = max(-(-end // BLOCK_SIZE) for end in ends)
    tables = torch.zeros(len(parts), width, dtype=torch.int32)
    for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
        used = -(-end // BLOCK_SIZE)
        tables[index, :used] = blocks[part.seq][:used]
    positions = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, rows, strict=True)])
    return AttentionMetadata(
        query_start_loc=torch.tensor([0, *np.cumsum(rows).tolist()], dtype=torch.int32, device=device),
        seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slot_mapping=torch.full((sum(rows),), -1, dtype=torch.int64, device=device),
        positions=positions.to(device),
        max_query_len=max(rows),
        max_seq_len=max(ends),
    )


def same_logits(
    model: str,
    kernels: KernelBackend,
    lengths: Sequence[int] = (5, 200, 1, 37, 999, 64, 128, 1500),
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """The share of sequences whose logits are the same bits in a batch of prompts, alone, and in two chunks.

    Args:
        model: `dummy:` is put before it.
        lengths: of the sequences in tokens.
    """
    target = torch.device(device)
    checkpoint = open_checkpoint(f"dummy:{model}")
    config = checkpoint.model_config()
    network = load_model(checkpoint, config, kernels, dtype, target)
    num_blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    cache = CacheEngine(config, CacheConfig(BLOCK_SIZE, sum(num_blocks), False), dtype, target, kernels)
    inputs = InputBatch(sum(lengths), len(lengths), max(num_blocks), BLOCK_SIZE, target)
    rng = np.random.default_rng(0)
    order = np.split(rng.permutation(sum(num_blocks)).astype(np.int32), np.cumsum(num_blocks)[:-1])
    tokens = [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in lengths]

    def logits(parts: Sequence[Stretch]) -> torch.Tensor:
        return _last_logits(network, cache.kv_pool, inputs, parts, tokens, order)

    with torch.inference_mode():
        together = logits([Stretch(seq, 0, length) for seq, length in enumerate(lengths)])
        same = 0
        for seq, length in enumerate(lengths):
            alone = logits([Stretch(seq, 0, length)])[0]
            if length > 1:
                logits([Stretch(seq, 0, length // 2)])
            chunked = logits([Stretch(seq, length // 2, length)])[0]
            same += bool(torch.equal(alone, together[seq]) and torch.equal(chunked, together[seq]))
    return same / len(lengths)


def _last_logits(
    network: CausalLM,
    pool: torch.Tensor,
    inputs: InputBatch,
    parts: Sequence[Stretch],
    tokens: Sequence[np.ndarray],
    blocks: Sequence[np.ndarray],
) -> torch.Tensor:
    """Logits after each stretch, `[len(parts), vocab_size]`; keys and values before it lie in the pool."""
    scheduled = tuple(
        ScheduledSequence(part.seq, part.first, tokens[part.seq][part.first : part.last], blocks[part.seq], ())
        for part in parts
    )
    step = inputs.fill(SchedulerOutput(scheduled))
    hidden = network.forward(step.token_ids, pool, step.metadata)
    last_rows = step.metadata.query_start_loc[1:].long() - 1
    return network.compute_logits(hidden[last_rows]).cpu()  # which waits: the inputs' buffers are filled again
