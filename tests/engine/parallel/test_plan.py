"""How decoders are split: examples that the plan's comment draws, and what holds of every split."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.loading.dummy_shapes import SHAPES
from engine.model_config import ModelConfig
from engine.parallel import DecoderShard, split_decoder
from tests.engine.doubles import MODEL


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(MODEL, **changes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "expected"),
    [
        (9, 3, 2, [(range(6), range(2)), (range(6, 9), range(2, 3))]),
        (9, 3, 3, [(range(3), range(1)), (range(3, 6), range(1, 2)), (range(6, 9), range(2, 3))]),
        (4, 2, 4, [(range(i, i + 1), range(i // 2, i // 2 + 1)) for i in range(4)]),
        # Ranks that do not divide among the KV heads, and a group that does not among its ranks.
        (6, 2, 3, [(range(2), range(1)), (range(2, 3), range(1)), (range(3, 6), range(1, 2))]),
        (12, 12, 5, [(range(i, j), range(i, j)) for i, j in ((0, 3), (3, 6), (6, 8), (8, 10), (10, 12))]),
    ],
)  # fmt: skip
def test_heads_are_split_by_kv_group(
    heads: int, kv_heads: int, ranks: int, expected: list[tuple[range, range]]
) -> None:
    shards = split_decoder(model(num_heads=heads, num_kv_heads=kv_heads, intermediate_size=1536), ranks)
    assert [(shard.query_heads, shard.kv_heads) for shard in shards] == expected


def test_the_mlp_is_split_at_blocks_of_32_columns() -> None:
    shards = split_decoder(SHAPES["smollm2-135m"], 5)
    assert [len(shard.mlp) for shard in shards] == [320, 320, 320, 288, 288]


def test_an_uneven_vocabulary_is_padded_to_the_largest_part() -> None:
    shards = split_decoder(SHAPES["opt-125m"], 3)
    assert [len(shard.vocab) for shard in shards] == [16768, 16768, 16736]
    assert {shard.vocab_padded for shard in shards} == {16768}


@given(
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 9),
    inner=st.integers(1, 700),
    vocab=st.integers(1, 3000),
    ranks=st.integers(1, 12),
)
def test_every_split_covers_the_model_once(group: int, kv_heads: int, inner: int, vocab: int, ranks: int) -> None:
    config = model(num_heads=group * kv_heads, num_kv_heads=kv_heads, intermediate_size=inner, vocab_size=vocab)
    assume(ranks <= group * kv_heads and ranks <= -(-inner // 32) and ranks <= vocab)
    shards = split_decoder(config, ranks)
    assert [shard.rank for shard in shards] == list(range(ranks))
    for part, total in (("query_heads", group * kv_heads), ("mlp", inner), ("vocab", vocab)):
        ranges: list[range] = [getattr(shard, part) for shard in shards]
        assert [i for each in ranges for i in each] == list(range(total)), part
        assert all(len(each) > 0 for each in ranges), part
    assert {head for shard in shards for head in shard.kv_heads} == set(range(kv_heads))
    for shard in shards:
        check_shard(shard, config)


def check_shard(shard: DecoderShard, config: ModelConfig) -> None:
    group = config.num_heads // config.num_kv_heads
    assert {head // group for head in shard.query_heads} == set(shard.kv_heads), "a query head lacks its KV head"
    assert shard.mlp.start % 32 == 0
    assert len(shard.vocab) <= shard.vocab_padded
    local = shard.config(config)  # checks itself: query heads are a multiple of KV heads
    assert (local.num_heads, local.num_kv_heads) == (len(shard.query_heads), len(shard.kv_heads))
    assert (local.intermediate_size, local.hidden_size) == (len(shard.mlp), config.hidden_size)


@pytest.mark.parametrize(
    ("changes", "ranks", "named"),
    [
        ({"num_heads": 4, "num_kv_heads": 2}, 5, "num_heads=4"),
        ({"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 96}, 4, "intermediate_size=96"),
        ({"num_heads": 8, "num_kv_heads": 8, "intermediate_size": 512, "vocab_size": 7}, 8, "vocab_size=7"),
    ],
)
def test_what_cannot_be_split_is_named(changes: dict[str, Any], ranks: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={ranks} .*{named}"):
        split_decoder(model(**changes), ranks)
