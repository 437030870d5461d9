"""Which block holds which prefix: the index behind prefix caching."""

from __future__ import annotations

from engine.memory.block_events import BlockEvents


class PrefixCache:
    """Maps chained block hashes to the blocks that hold them, one block a hash.

    It holds no references: a cached block may be in use or free. A free one stays findable until the allocator hands
    it out again, when the KV cache manager removes it here (least recently used first, by the free list's order).

    Attributes:
        events: told of every change; None while nobody listens.
    """

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.events: BlockEvents | None = None

    def __len__(self) -> int:
        return len(self._block_of)

    def find(self, block_hash: bytes) -> int | None:
        return self._block_of.get(block_hash)

    def hash_of(self, block: int) -> bytes | None:
        return self._hash_of.get(block)

    def insert(self, block_hash: bytes, block: int) -> None:
        """Index a full block. The first holder of a content stays; a later duplicate is simply not indexed."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash
            if self.events is not None:
                self.events.stored(block_hash)

    def remove(self, block: int) -> bool:
        """Forget a block that is about to be overwritten; whether it was indexed."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            if self.events is not None:
                self.events.removed(block_hash)
        return block_hash is not None

    def watch(self) -> BlockEvents:
        """Record changes from now on; what is cached already is the first of them."""
        self.events = BlockEvents()
        for block_hash in self._block_of:
            self.events.stored(block_hash)
        return self.events

    def clear(self) -> None:
        if self.events is not None:
            for block_hash in self._block_of:
                self.events.removed(block_hash)
        self._block_of.clear()
        self._hash_of.clear()

    def check_invariants(self) -> None:
        assert len(self._block_of) == len(self._hash_of)
        assert all(self._hash_of[block] == block_hash for block_hash, block in self._block_of.items())
