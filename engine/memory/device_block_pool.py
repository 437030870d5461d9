"""Blocks of the device's pool: which are free, how many block tables name each, and what is cached in them."""

from __future__ import annotations

import array
from collections import Counter
from collections.abc import Iterable

from engine.memory.block_allocator import BlockAllocator
from engine.memory.prefix_cache import PrefixCache


class DeviceBlockPool:
    """A block's reference count is the number of block tables that name it.

    At 0 it is free; if the prefix cache knows its content, it stays findable until it is handed out again, the least
    recently used first.

    Attributes:
        ref_counts: by block.
        pinned: blocks that no preemption takes; some table names each for good.
        prefix_cache: None where nothing is cached.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.ref_counts = array.array("i", bytes(4 * num_blocks))
        self.pinned: set[int] = set()
        self.prefix_cache = PrefixCache() if enable_prefix_caching else None
        self._allocator = BlockAllocator(num_blocks)
        self._num_free_cached = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self._allocator.num_free

    @property
    def num_empty(self) -> int:
        """Free blocks in which nothing is cached."""
        return self._allocator.num_free - self._num_free_cached

    def is_free(self, block: int) -> bool:
        return self._allocator.is_free(block)

    def allocate(self) -> int:
        """A free block with one reference; what was cached in it is forgotten."""
        block = self._allocator.allocate()
        if self.prefix_cache is not None and self.prefix_cache.remove(block):
            self._num_free_cached -= 1
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block, in use or free but cached."""
        if self.ref_counts[block] == 0:
            self._allocator.take(block)
            self._num_free_cached -= 1
        self.ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference."""
        self.ref_counts[block] -= 1
        assert self.ref_counts[block] >= 0
        if self.ref_counts[block] == 0:
            cached = self.prefix_cache is not None and self.prefix_cache.hash_of(block) is not None
            self._allocator.free(block, reuse_last=cached)
            self._num_free_cached += cached

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds this content, if one is cached."""
        return self.prefix_cache.find(block_hash) if self.prefix_cache is not None else None

    def find_prefix(self, block_hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of this chain."""
        hits: list[int] = []
        for block_hash in block_hashes:
            block = self.find(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def reset_prefix_cache(self) -> None:
        """Forget all cached content but the pinned."""
        if self.prefix_cache is None:
            return
        pinned = {block: self.prefix_cache.hash_of(block) for block in self.pinned}
        self.prefix_cache.clear()
        self._num_free_cached = 0
        for block, block_hash in pinned.items():
            if block_hash is not None:
                self.prefix_cache.insert(block_hash, block)

    def check_invariants(self, named: Counter[int]) -> None:
        """Raise AssertionError unless `named` counts each block as often as it is held here. O(blocks)."""
        free = self._allocator.free_blocks()
        assert len(free) == self._allocator.num_free == len(set(free))
        assert all(self.ref_counts[block] == named[block] for block in range(self.num_blocks))
        assert set(free) == {block for block in range(self.num_blocks) if named[block] == 0}
        assert all(named[block] > 0 for block in self.pinned), "a pinned block is held by nobody"
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()
        cached = [block for block in free if self.prefix_cache is not None and self.prefix_cache.hash_of(block)]
        assert len(cached) == self._num_free_cached
