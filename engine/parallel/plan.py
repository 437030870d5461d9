"""How a decoder is split over ranks, as plain ranges: Megatron-LM's split (arXiv 1909.08053). No torch.

Query, key, value, gate and up are split by output columns, attention's and the MLP's output by input rows, so that a
rank's heads and its part of the MLP need nothing of the others until their products are summed:

    SmolLM2's 9 query heads, 3 for each of its KV heads, on 2 ranks    0–5, KV 0–1   6–8, KV 2
    4 query heads, 2 for each of 2 KV heads, on 4 ranks                0, KV 0   1, KV 0   2, KV 1   3, KV 1
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from engine.errors import ConfigError
from engine.model_config import ModelConfig

# Quantised weights, and the rows that they meet, have a scale for 32 values along K.
MLP_UNIT = 32
# Rows of a vocabulary's shard, where there are enough: matrix units want no less.
VOCAB_UNIT = 64


@dataclass(frozen=True)
class DecoderShard:
    """One rank's part of a decoder.

    Attributes:
        query_heads, kv_heads: heads, in the model's numbering. Ranks that share a KV head each hold all of it.
        mlp: columns of the MLP's inner width.
        vocabs: each rank's token ids, whose rows of the embedding and of the head it holds; see `vocab`.
    """

    rank: int
    world_size: int
    query_heads: range
    kv_heads: range
    mlp: range
    vocabs: tuple[range, ...]

    @property
    def vocab(self) -> range:
        """This rank's token ids."""
        return self.vocabs[self.rank]

    @property
    def vocab_padded(self) -> int:
        """The size of the largest rank's vocabulary, which others pad theirs to where all must be equal."""
        return max(map(len, self.vocabs))

    def config(self, model: ModelConfig) -> ModelConfig:
        """The model as this rank computes it between two sums: its heads and its part of the MLP."""
        return dataclasses.replace(
            model,
            num_heads=len(self.query_heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.mlp),
        )


def split_decoder(config: ModelConfig, world_size: int) -> list[DecoderShard]:
    """Each rank's part.

    Raises:
        ConfigError: there are more ranks than something that must be split has parts.
    """
    heads = _split_heads(config, world_size)
    mlp = _split(config.intermediate_size, world_size, MLP_UNIT)
    if mlp is None:
        raise ConfigError(
            f"tensor_parallel_size={world_size} is more than the blocks of {MLP_UNIT} columns in the MLP's "
            f"intermediate_size={config.intermediate_size}"
        )
    vocab = _split(config.vocab_size, world_size, VOCAB_UNIT) or _split(config.vocab_size, world_size, 1)
    if vocab is None:
        raise ConfigError(f"tensor_parallel_size={world_size} is more than vocab_size={config.vocab_size}")
    return [DecoderShard(rank, world_size, *heads[rank], mlp[rank], tuple(vocab)) for rank in range(world_size)]


def _split_heads(config: ModelConfig, world_size: int) -> list[tuple[range, range]]:
    """Query heads and KV heads of each rank: whole groups of a KV head and its query heads, or parts of one group."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    if world_size > num_heads:
        raise ConfigError(f"tensor_parallel_size={world_size} is more than the model's num_heads={num_heads}")
    group = num_heads // num_kv_heads
    whole = _split(num_kv_heads, world_size, 1)
    if whole is not None:
        return [(range(kv.start * group, kv.stop * group), kv) for kv in whole]
    ranks = _split(world_size, num_kv_heads, 1)
    assert ranks is not None
    heads = []
    for kv_head, sharing in enumerate(ranks):
        parts = _split(group, len(sharing), 1)
        assert parts is not None  # ceil(world_size / num_kv_heads) <= group, as world_size <= num_heads
        first = kv_head * group
        heads += [(range(first + part.start, first + part.stop), range(kv_head, kv_head + 1)) for part in parts]
    return heads


def _split(total: int, parts: int, unit: int) -> list[range] | None:
    """`total` in as many runs of whole units, but for the end of the last; the first runs have one more where the units
    do not divide. None if there are too few units."""
    num_units = -(-total // unit)
    if num_units < parts:
        return None
    each, more = divmod(num_units, parts)
    ends = [unit * (each * (i + 1) + min(i + 1, more)) for i in range(parts)]
    ends[-1] = total
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
