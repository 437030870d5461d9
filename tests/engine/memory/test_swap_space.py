"""Swapping through the KV cache manager's face, which alone knows the tables that are swapped."""

from __future__ import annotations

from engine.sequence import Sequence
from tests.engine.memory.test_kv_cache_manager import ROOT, admit, compute, make_manager


def test_swap_keeps_sharing_and_copies_each_block_once() -> None:
    manager = make_manager(num_blocks=8, num_swap_blocks=4, caching=False)
    parent = admit(manager, [1, 2, 3, 4, 5, 6])
    child = Sequence([1, 2, 3, 4, 5, 6], 1)
    manager.fork(parent, child)
    compute(manager, child, 1)  # diverges in the second block
    assert len(manager.swap_blocks([parent, child])) == 3
    out = manager.swap_out([parent, child])
    assert len(out) == 3
    assert manager.num_free_blocks == 8
    assert manager.num_free_swap_blocks == 1
    manager.check_invariants()
    assert manager.num_blocks_to_swap_in([parent, child]) == 3
    into = manager.swap_in([parent, child])
    assert sorted(copy.source for copy in into) == sorted(copy.destination for copy in out)
    assert manager.num_free_blocks == 5
    assert manager.num_free_swap_blocks == 4
    assert manager.block_table(parent)[0] == manager.block_table(child)[0]
    assert manager.block_table(parent)[1] != manager.block_table(child)[1]
    manager.check_invariants()


def test_swap_in_takes_what_is_still_cached_instead_of_copying() -> None:
    manager = make_manager(num_blocks=8, num_swap_blocks=8)
    seq, other = admit(manager, list(range(10))), admit(manager, list(range(5)))
    manager.swap_out([seq])
    assert manager.num_blocks_to_swap_in([seq]) == 2, "the first block is held by another, the second lies free"
    copies = manager.swap_in([seq])
    assert len(copies) == 1, "only the last, partly filled block is copied"
    assert manager.block_table(seq)[0] == manager.block_table(other)[0]
    manager.check_invariants()


def test_unwritten_blocks_are_dropped_and_not_swapped() -> None:
    manager = make_manager(num_blocks=8, num_swap_blocks=8, caching=False)
    seq = Sequence(list(range(20)))
    manager.allocate(seq, ROOT, 20)
    compute(manager, seq, 6)
    assert len(manager.swap_out([seq])) == 2
    assert manager.num_free_blocks == 8
    manager.swap_in([seq])
    assert len(manager.block_table(seq)) == 2
    compute(manager, seq, 14)
    assert len(manager.block_table(seq)) == 5


def test_a_small_host_pool_says_so() -> None:
    manager = make_manager(num_blocks=8, num_swap_blocks=2)
    assert manager.can_swap_out([admit(manager, [1] * 8)])
    assert not manager.can_swap_out([admit(manager, [2] * 9)])


def test_pinned_blocks_stay_on_the_device() -> None:
    manager = make_manager(num_blocks=8, num_swap_blocks=8)
    prefix = admit(manager, [1] * 8)
    manager.pin(prefix)
    seq = Sequence([1] * 10)
    manager.allocate(seq, ROOT, 10)
    compute(manager, seq, 2)
    assert len(manager.swap_out([seq])) == 1
    manager.check_invariants()
    manager.swap_in([seq])
    assert manager.block_table(seq).blocks.tolist()[:2] == manager.block_table(prefix).blocks.tolist()
    manager.swap_out([seq])
    manager.free(seq)
    manager.check_invariants()
    assert manager.num_free_blocks == 6


def test_a_group_swaps_while_another_goes_on_in_the_blocks_that_they_share() -> None:
    manager = make_manager(num_blocks=16, num_swap_blocks=8)
    prompt = [1] * 10
    mine, other = admit(manager, prompt), admit(manager, prompt)
    child = Sequence(prompt, 1)
    manager.fork(mine, child)
    compute(manager, child, 1)  # a copy of the last block; the first two belong to both groups
    shared = manager.block_table(other).blocks.tolist()[:2]
    assert [manager.block_table(seq).blocks.tolist()[:2] for seq in (mine, child)] == [shared] * 2
    assert len(manager.swap_out([mine, child])) == 4, "each block of the group once"
    assert manager.block_table(other).blocks.tolist()[:2] == shared
    manager.check_invariants()
    compute(manager, other, 4)
    assert len(manager.swap_in([mine, child])) == 2, "what the other group holds is shared again, not copied"
    assert [manager.block_table(seq).blocks.tolist()[:2] for seq in (mine, child)] == [shared] * 2
    manager.check_invariants()
    for seq in (other, mine, child):
        manager.free(seq)
    assert manager.num_free_blocks == 16
    assert manager.num_free_swap_blocks == 8
