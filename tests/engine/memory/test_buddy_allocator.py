from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.memory.buddy_allocator import BuddyAllocator, run_size


def test_a_run_is_split_off_and_merged_again() -> None:
    pool = BuddyAllocator(16)
    assert pool.largest_free_run == 16
    first = pool.allocate(3)
    assert pool.runs() == [(first, 4)], "three blocks take a run of four"
    assert pool.free_runs() == [(4, 4), (8, 8)]
    second = pool.allocate(1)
    assert (second, pool.largest_free_run, pool.num_free) == (4, 8, 11)
    pool.free(first)
    assert pool.largest_free_run == 8, "its buddy is in use"
    pool.free(second)
    assert pool.free_runs() == [(0, 16)]


def test_the_smallest_run_that_fits_is_split() -> None:
    pool = BuddyAllocator(16)
    held = pool.allocate(4)
    assert pool.allocate(2) == 4, "out of the run of four, not the run of eight"
    assert pool.largest_free_run == 8
    assert held == 0


def test_free_blocks_that_are_not_contiguous_serve_no_larger_run() -> None:
    pool = BuddyAllocator(8)
    starts = [pool.allocate(1) for _ in range(8)]
    for start in starts[::2]:
        pool.free(start)
    assert (pool.num_free, pool.largest_free_run) == (4, 1)
    assert not pool.can_allocate(2)
    assert pool.num_free_in_runs_of(2) == 0
    assert pool.num_free_in_runs_of(1) == 4
    assert pool.can_allocate(1, count=4)
    assert not pool.can_allocate(1, count=5)


def test_a_pool_of_another_size_has_one_root_a_bit() -> None:
    # Table 1: OPT-13B on an A100-40GB holds 15.7K slots, seven runs of 2,048.
    pool = BuddyAllocator(15_728 // 16)
    assert pool.num_blocks == 983
    assert [size for _, size in pool.free_runs()] == [512, 256, 128, 64, 16, 4, 2, 1]
    assert pool.can_allocate(128, count=7)
    assert not pool.can_allocate(128, count=8)


@pytest.mark.parametrize(("wanted", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (128, 128), (129, 256)])
def test_runs_are_powers_of_two(wanted: int, size: int) -> None:
    assert run_size(wanted) == size


def test_a_run_larger_than_any_root_never_fits() -> None:
    pool = BuddyAllocator(7)
    assert not pool.can_allocate(5)
    assert pool.num_free_in_runs_of(1000) == 0


@given(num_blocks=st.integers(1, 200), wanted=st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_can_allocate_counts_exactly_what_allocate_gives(num_blocks: int, wanted: int) -> None:
    pool = BuddyAllocator(num_blocks)
    given_out = 0
    while pool.can_allocate(wanted):
        pool.allocate(wanted)
        given_out += 1
    fresh = BuddyAllocator(num_blocks)
    assert fresh.can_allocate(wanted, given_out)
    assert not fresh.can_allocate(wanted, given_out + 1)


class BuddyMachine(RuleBasedStateMachine):
    """Random allocations and frees, beside a plain array that says which block belongs to whom."""

    @initialize(num_blocks=st.integers(1, 100))
    def start(self, num_blocks: int) -> None:
        self.pool = BuddyAllocator(num_blocks)
        self.fresh_runs = self.pool.free_runs()
        self.owner: list[int | None] = [None] * num_blocks
        self.starts: list[int] = []

    @rule(wanted=st.integers(1, 40))
    def allocate(self, wanted: int) -> None:
        size = run_size(wanted)
        # By brute force: is there an aligned, wholly free run of that size?
        free_spots = [
            spot
            for spot in range(0, len(self.owner) - size + 1, size)
            if all(owner is None for owner in self.owner[spot : spot + size])
        ]
        assert self.pool.can_allocate(wanted, len(free_spots)) or not free_spots
        assert not self.pool.can_allocate(wanted, len(free_spots) + 1)
        if free_spots:
            start = self.pool.allocate(wanted)
            assert start in free_spots
            self.owner[start : start + size] = [start] * size
            self.starts.append(start)

    @precondition(lambda self: bool(getattr(self, "starts", None)))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        start = self.starts.pop(data.draw(st.integers(0, len(self.starts) - 1)))
        self.pool.free(start)
        self.owner = [None if owner == start else owner for owner in self.owner]

    @invariant()
    def accounts_agree(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_invariants()
            assert self.pool.num_free == self.owner.count(None)
            assert self.pool.largest_free_run == max([size for _, size in self.pool.free_runs()], default=0)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for start in self.starts:
                self.pool.free(start)
            assert self.pool.free_runs() == self.fresh_runs, "coalescing did not restore the pool"


TestBuddyMachine = BuddyMachine.TestCase
TestBuddyMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
