from __future__ import annotations

import pytest

from engine.memory import BlockAllocator


def test_all_blocks_start_free_and_come_in_order() -> None:
    allocator = BlockAllocator(3)
    assert [allocator.allocate() for _ in range(3)] == [0, 1, 2]
    assert allocator.num_free == 0


def test_an_empty_pool_and_a_double_free_are_caught() -> None:
    allocator = BlockAllocator(1)
    block = allocator.allocate()
    with pytest.raises(AssertionError, match="empty pool"):
        allocator.allocate()
    allocator.free(block, reuse_last=True)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(block, reuse_last=False)


def test_reuse_order_puts_worthless_blocks_first_and_cached_ones_last() -> None:
    allocator = BlockAllocator(4)
    blocks = [allocator.allocate() for _ in range(4)]
    allocator.free(blocks[2], reuse_last=True)
    allocator.free(blocks[0], reuse_last=True)
    allocator.free(blocks[3], reuse_last=False)
    assert allocator.free_blocks() == [3, 2, 0]


def test_a_block_can_be_taken_from_the_middle() -> None:
    allocator = BlockAllocator(5)
    allocator.take(2)
    assert not allocator.is_free(2)
    assert allocator.free_blocks() == [0, 1, 3, 4]
    with pytest.raises(AssertionError, match="in use"):
        allocator.take(2)
