"""What is launched for which batch."""

from __future__ import annotations

import pytest

from engine.kernels.triton.attention_plan import SEGMENT, AttentionShape, choose_tile, plan_attention

LLAMA = AttentionShape(64, 64, 1, 4096, 8, 4, 128, wide=False)


def test_decodes_are_split_only_where_they_do_not_fill_the_device() -> None:
    (launch,) = plan_attention(LLAMA, 132, batch_invariant=False)
    assert (launch.one_tile, launch.num_tiles, launch.num_splits) == (True, 64, 1)
    (launch,) = plan_attention(LLAMA._replace(num_seqs=2, num_tokens=2), 132, batch_invariant=False)
    assert launch.num_splits == 264 // 16
    (launch,) = plan_attention(LLAMA._replace(num_seqs=1, num_tokens=1, max_seq_len=300), 132, batch_invariant=False)
    assert launch.num_splits == 1  # too short


def test_a_mixed_batch_is_two_launches_that_share_out_the_sequences() -> None:
    shape = LLAMA._replace(num_tokens=2048, max_query_len=1900)
    small, large = plan_attention(shape, 132, batch_invariant=False)
    assert small.max_query_len + 1 == large.min_query_len
    assert small.max_query_len * shape.group <= small.tile.lanes
    assert large.max_query_len > shape.max_query_len
    # However the rows fall on the sequences, there are tiles enough: each sequence may leave one unfilled.
    assert large.num_tiles == 2048 // 32 + 64


@pytest.mark.parametrize("group", [1, 3, 4, 8, 71])
def test_a_tile_has_a_whole_group(group: int) -> None:
    for lanes in (16, 64, 128):
        for wide in (False, True):
            tile = choose_tile(lanes, LLAMA._replace(group=group, wide=wide))
            assert tile.lanes >= max(group, 16)
            assert SEGMENT % tile.tokens == 0


def test_batch_invariant_plans_have_one_kind_of_tile() -> None:
    shapes = [
        LLAMA,
        LLAMA._replace(num_seqs=1, num_tokens=1),
        LLAMA._replace(num_tokens=2048, max_query_len=1900),
        LLAMA._replace(num_tokens=70, max_query_len=7),
    ]
    plans = [plan_attention(shape, 132, batch_invariant=True) for shape in shapes]
    assert {(len(plan), plan[0].tile, plan[0].segment) for plan in plans} == {(1, plans[0][0].tile, SEGMENT)}
    assert [plan[0].num_splits for plan in plans] == [1, 4096 // SEGMENT, 1, 1]


def test_sums_of_splits_have_a_bound() -> None:
    """A few long sequences with many rows: the same bits without room for each segment's sums."""
    shape = LLAMA._replace(num_seqs=4, num_tokens=64, max_query_len=16, max_seq_len=1 << 20)
    (launch,) = plan_attention(shape, 132, batch_invariant=True)
    assert launch.num_splits == 1
