from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import CacheConfig
from engine.memory import BlockCopy, KVCacheManager, root_hash
from engine.sequence import Sequence

ROOT = root_hash("model")


def make_manager(
    num_blocks: int = 8, block_size: int = 4, caching: bool = True, num_swap_blocks: int = 0
) -> KVCacheManager:
    return KVCacheManager(CacheConfig(block_size, num_blocks, caching, num_swap_blocks))


def compute(manager: KVCacheManager, seq: Sequence, num_tokens: int) -> list[BlockCopy]:
    """What a step does with `num_tokens` tokens of a sequence; draws those that it lacks."""
    while seq.num_tokens < seq.num_computed_tokens + num_tokens:
        seq.append_token(0, 0.0)
    copies = manager.append(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    manager.cache_full_blocks(seq, ROOT)
    return copies


def admit(manager: KVCacheManager, tokens: list[int]) -> Sequence:
    seq = Sequence(tokens)
    manager.allocate(seq, ROOT, seq.num_tokens)
    compute(manager, seq, seq.num_tokens - seq.num_computed_tokens)
    return seq


def test_blocks_are_allocated_on_demand_and_freed() -> None:
    manager = make_manager()
    seq = admit(manager, [1, 2, 3, 4, 5])
    assert manager.num_free_blocks == 6
    for _ in range(3):
        compute(manager, seq, 1)
    assert manager.num_free_blocks == 6, "the second block had room for three more"
    compute(manager, seq, 1)
    assert manager.num_free_blocks == 5
    manager.free(seq)
    assert manager.num_free_blocks == 8
    manager.free(seq)  # a second time is no error
    manager.check_invariants()


def test_equal_prefixes_share_full_blocks_but_for_the_last_token() -> None:
    manager = make_manager()
    first = admit(manager, list(range(8)))
    second = Sequence(list(range(8)))
    assert manager.allocate(second, ROOT, 8) == 4, "the block of the last token is computed again"
    assert manager.block_table(second)[0] == manager.block_table(first)[0]
    assert manager.block_table(second)[1] != manager.block_table(first)[1]
    third = Sequence([*range(8), 9])
    assert manager.allocate(third, ROOT, 9) == 8
    assert manager.block_table(third).blocks.tolist()[:2] == manager.block_table(first).blocks.tolist()
    manager.check_invariants()


def test_a_prefix_under_another_root_is_not_found() -> None:
    manager = make_manager()
    admit(manager, list(range(8)))
    other = Sequence(list(range(8)))
    assert manager.allocate(other, root_hash("model", salt="tenant"), 8) == 0


def test_without_caching_nothing_is_shared() -> None:
    manager = make_manager(caching=False)
    manager.free(admit(manager, list(range(8))))
    assert manager.allocate(Sequence(list(range(8))), ROOT, 8) == 0


def test_freed_blocks_stay_cached_until_the_least_recently_used_is_taken() -> None:
    manager = make_manager(num_blocks=4)
    manager.free(admit(manager, [1] * 8))
    manager.free(admit(manager, [2] * 8))
    manager.free(admit(manager, [3] * 4))  # takes the oldest chain's tail, not its head
    probe = Sequence([1] * 8)
    assert manager.allocate(probe, ROOT, 8) == 4
    manager.free(probe)
    assert manager.allocate(Sequence([2] * 5), ROOT, 5) == 4
    manager.check_invariants()


def test_admission_counts_free_hits_as_taken() -> None:
    manager = make_manager(num_blocks=2)
    manager.free(admit(manager, [1] * 8))
    assert manager.can_allocate(Sequence([1] * 8), ROOT, 8)
    assert not manager.can_allocate(Sequence([1] * 8), ROOT, 8, num_spare=1)
    assert not manager.can_allocate(Sequence([1] * 9), ROOT, 9)


def test_fork_shares_and_the_first_write_copies() -> None:
    manager = make_manager()
    parent = admit(manager, [1, 2, 3, 4, 5])
    child, other = Sequence([1, 2, 3, 4, 5], 1), Sequence([1, 2, 3, 4, 5], 2)
    manager.fork(parent, child)
    manager.fork(parent, other)
    assert manager.num_free_blocks == 6
    assert manager.num_blocks_to_append([(parent, 1), (child, 1), (other, 1)]) == 2, "the last holder writes in place"
    assert manager.num_blocks_to_append([(parent, 1), (child, 1)]) == 2
    shared = manager.block_table(parent)[1]
    assert manager.append(parent, 1) == [(shared, manager.block_table(parent)[1])]
    assert len(manager.append(child, 1)) == 1
    assert manager.append(other, 1) == []
    assert manager.block_table(other)[1] == shared
    assert manager.block_table(parent)[0] == manager.block_table(child)[0] == manager.block_table(other)[0]
    manager.check_invariants()


def test_fork_at_a_block_border_copies_nothing() -> None:
    manager = make_manager()
    parent = admit(manager, [1, 2, 3, 4])
    child = Sequence([1, 2, 3, 4], 1)
    manager.fork(parent, child)
    assert manager.append(parent, 1) == []
    assert manager.append(child, 1) == []
    assert manager.block_table(parent)[1] != manager.block_table(child)[1]
    manager.check_invariants()


def test_blocks_can_be_handed_over() -> None:
    manager = make_manager()
    seq, heir = admit(manager, [1, 2, 3, 4, 5]), Sequence([1, 2, 3, 4, 5, 6], 1)
    manager.hand_over(seq, heir)
    assert not manager.holds(seq)
    assert heir.num_computed_tokens == 5
    manager.free(heir)
    manager.check_invariants()
    assert manager.num_free_blocks == 8


def test_waste_is_less_than_a_block_a_sequence() -> None:
    manager = make_manager(num_blocks=64, block_size=16)
    for length in range(1, 40):
        seq = admit(manager, [length] * length)
        slack = len(manager.block_table(seq)) * 16 - length
        assert 0 <= slack < 16
        manager.free(seq)


@pytest.mark.parametrize("block_size", [1, 2, 16, 256])
def test_block_sizes(block_size: int) -> None:
    manager = make_manager(num_blocks=600, block_size=block_size)
    seq = admit(manager, list(range(300)))
    assert len(manager.block_table(seq)) == -(-300 // block_size)
    manager.free(seq)
    again = Sequence(list(range(300)))
    assert manager.allocate(again, ROOT, 300) == (299 // block_size) * block_size
    manager.check_invariants()


class KVCacheMachine(RuleBasedStateMachine):
    """Random admissions, growth, forks, swaps and frees over a model of what each physical slot holds.

    Most prompts begin alike, so that the prefix cache has requests share blocks that others fork, copy, swap and free.

    `contents` plays the device: (block, offset) → the prefix of tokens that the slot stands for. A sequence must
    always read back exactly its own prefix, whatever was shared, copied, cached or evicted in between.
    """

    @initialize(
        num_blocks=st.integers(8, 32),
        block_size=st.sampled_from([1, 2, 4, 8]),
        caching=st.sampled_from([True, True, True, False]),
        num_swap_blocks=st.sampled_from([0, 4, 16, 32]),
    )
    def start(self, num_blocks: int, block_size: int, caching: bool, num_swap_blocks: int) -> None:
        self.block_size = block_size
        self.manager = make_manager(num_blocks, block_size, caching, num_swap_blocks)
        self.contents: dict[tuple[int, int], tuple[int, ...]] = {}
        self.host: dict[tuple[int, int], tuple[int, ...]] = {}
        self.live: list[Sequence] = []
        self.swapped: list[list[Sequence]] = []

    def move(
        self,
        copies: list[BlockCopy],
        source: dict[tuple[int, int], tuple[int, ...]],
        destination: dict[tuple[int, int], tuple[int, ...]],
    ) -> None:
        for copy in copies:
            for offset in range(self.block_size):
                destination.pop((copy.destination, offset), None)
                if (copy.source, offset) in source:
                    destination[copy.destination, offset] = source[copy.source, offset]

    def write(self, seq: Sequence, num_tokens: int) -> None:
        self.move(self.manager.append(seq, num_tokens), self.contents, self.contents)
        table = self.manager.block_table(seq)
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + num_tokens):
            slot = table[position // self.block_size], position % self.block_size
            self.contents[slot] = tuple(seq.token_ids[: position + 1].tolist())
        seq.num_computed_tokens += num_tokens
        self.manager.cache_full_blocks(seq, ROOT)

    @rule(num_common=st.integers(0, 20), tail=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def admit(self, num_common: int, tail: list[int]) -> None:
        tokens = [0] * num_common + tail
        seq = Sequence(tokens)
        if self.manager.can_allocate(seq, ROOT, len(tokens)):
            cached = self.manager.allocate(seq, ROOT, len(tokens))
            assert cached < len(tokens)
            assert cached % self.block_size == 0
            self.write(seq, len(tokens) - cached)
            self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        seq = data.draw(st.sampled_from(self.live))
        if self.manager.num_blocks_to_append([(seq, 1)]) <= self.manager.num_free_blocks:
            seq.append_token(token, 0.0)
            self.write(seq, 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), diverges=st.booleans())
    def fork(self, data: st.DataObject, diverges: bool) -> None:
        parent = data.draw(st.sampled_from(self.live))
        child = Sequence(parent.token_ids, index=1)
        free = self.manager.num_free_blocks
        self.manager.fork(parent, child)
        assert self.manager.num_free_blocks == free, "a fork takes no memory"
        self.live.append(child)
        if diverges and self.manager.num_blocks_to_append([(child, 1)]) <= free:
            child.append_token(1, 0.0)
            self.write(child, 1)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.manager.free(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def exact_need(self, data: st.DataObject) -> None:
        """The blocks that a joint append takes are predicted exactly."""
        seqs = data.draw(st.lists(st.sampled_from(self.live), unique=True, min_size=1))
        need = self.manager.num_blocks_to_append([(seq, 1) for seq in seqs])
        before = self.manager.num_free_blocks
        if need <= before:
            for seq in seqs:
                seq.append_token(0, 0.0)
                self.write(seq, 1)
            assert self.manager.num_free_blocks == before - need

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def swap_out(self, data: st.DataObject) -> None:
        group = data.draw(st.lists(st.sampled_from(self.live), unique=True, min_size=1, max_size=3))
        if self.manager.can_swap_out(group):
            free = self.manager.num_free_blocks
            exclusive = self.manager.num_exclusive_blocks(group)
            self.move(self.manager.swap_out(group), self.contents, self.host)
            assert self.manager.num_free_blocks == free + exclusive
            self.live = [seq for seq in self.live if seq not in group]
            self.swapped.append(group)

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def swap_in(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.swapped))
        need = self.manager.num_blocks_to_swap_in(group)
        free = self.manager.num_free_blocks
        if need <= free:
            self.move(self.manager.swap_in(group), self.host, self.contents)
            assert free - self.manager.num_free_blocks <= need
            self.swapped.remove(group)
            self.live += group

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def drop_swapped(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.swapped))
        self.manager.free(group.pop())
        if not group:
            self.swapped.remove(group)

    @rule()
    def forget_cache(self) -> None:
        self.manager.reset_prefix_cache()

    @invariant()
    def every_sequence_reads_its_own_prefix(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_invariants()
        for seq in self.live:
            table = self.manager.block_table(seq)
            for position in range(seq.num_computed_tokens):
                slot = table[position // self.block_size], position % self.block_size
                assert self.contents[slot] == tuple(seq.token_ids[: position + 1].tolist())

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for seq in [*self.live, *(seq for group in self.swapped for seq in group)]:
                self.manager.free(seq)
            self.manager.check_invariants()
            assert self.manager.num_free_blocks == self.manager.config.num_blocks
            assert self.manager.num_free_swap_blocks == self.manager.config.num_swap_blocks


TestKVCacheMachine = KVCacheMachine.TestCase
TestKVCacheMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
