"""The physical blocks of one KV pool: which are free, and in which order they are reused."""

from __future__ import annotations

import array


class BlockAllocator:
    """Hands out block ids from an intrusive doubly linked free list; every operation is O(1) (§4.2).

    The list runs from the next block to reuse (front) to the last (back). A block whose content may still be wanted
    goes to the back and can be taken out of the middle when it is wanted again, which makes the list the
    least-recently-used order of the prefix cache. The allocator knows nothing of reference counts or contents.

    Args:
        num_blocks: ids run from 0 to `num_blocks - 1`; all start free.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # Links of a ring through the sentinel `num_blocks`; -1 marks a block that is in use.
        self._next = array.array("q", [*range(1, num_blocks + 1), 0])
        self._prev = array.array("q", [num_blocks, *range(num_blocks)])

    def is_free(self, block: int) -> bool:
        return bool(self._next[block] >= 0)

    def allocate(self) -> int:
        """Take the block at the front. The caller has checked `num_free`."""
        block = int(self._next[self.num_blocks])
        assert block != self.num_blocks, "allocate() from an empty pool"
        self.take(block)
        return block

    def take(self, block: int) -> None:
        """Take one particular free block, wherever it stands in the list."""
        assert self.is_free(block), f"block {block} is in use"
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self._next[block] = self._prev[block] = -1
        self.num_free -= 1

    def free(self, block: int, *, reuse_last: bool) -> None:
        """Give a block back: to the back of the list if its content is worth keeping, else to the front."""
        assert not self.is_free(block), f"block {block} is freed twice"
        end = self.num_blocks
        before = self._prev[end] if reuse_last else end
        after = end if reuse_last else self._next[end]
        self._next[before] = self._prev[after] = block
        self._prev[block], self._next[block] = before, after
        self.num_free += 1

    def free_blocks(self) -> list[int]:
        """Ids in reuse order. O(num_free); for tests and `check_invariants()`."""
        blocks = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks:
            blocks.append(block)
            block = self._next[block]
        return blocks
