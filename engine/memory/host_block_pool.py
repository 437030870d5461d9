"""Blocks of the host's swap pool: which are free, and how many swapped-out tables name each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.memory.block_allocator import BlockAllocator


class HostBlockPool:
    """A bounded pool of host blocks with reference counts, so that a group's sharing survives its swap (§4.5).

    Args:
        num_blocks: 0 for no swapping.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._allocator = BlockAllocator(num_blocks) if num_blocks else None
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return self._allocator.num_free if self._allocator is not None else 0

    def allocate(self) -> int:
        """A block that nobody names yet; `share` follows."""
        assert self._allocator is not None
        return self._allocator.allocate()

    def share(self, block: int) -> None:
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        assert self._allocator is not None or not list(blocks)
        for block in blocks:
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0
            if self._ref_counts[block] == 0 and self._allocator is not None:
                self._allocator.free(block, reuse_last=False)

    def check_invariants(self, named: Counter[int]) -> None:
        """Raise AssertionError unless `named` counts each block as often as it is held here."""
        assert all(self._ref_counts[block] == named[block] for block in range(self.num_blocks))
        if self._allocator is not None:
            free = set(self._allocator.free_blocks())
            assert free == {block for block in range(self.num_blocks) if named[block] == 0}
