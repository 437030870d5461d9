"""The one owner of KV blocks: block tables, reference counts, sharing and copy-on-write (§4.2–4.4)."""

from __future__ import annotations

import array
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from engine.config import CacheConfig
from engine.memory.block_allocator import BlockAllocator
from engine.memory.block_hash import hash_blocks
from engine.memory.block_table import BlockTable
from engine.memory.prefix_cache import PrefixCache
from engine.sequence import Sequence, SequenceGroup

# Blocks kept free when a group is admitted beside running ones, as a share of the pool: what the running groups
# need next, so that an admission is not paid for with a preemption in the following step.
WATERMARK = 0.01


class BlockCopy(NamedTuple):
    """Copy a whole block before this step's writes: copy-on-write."""

    source: int
    destination: int


class KVCacheManager:
    """Maps sequences to physical blocks. Nothing else changes a reference count or a block table.

    A block's reference count is the number of block tables that name it. At 0 it is free; if the prefix cache knows
    its content, it stays findable until it is handed out again, the least recently used first.

    Ownership of a sequence's index range [0, num_tokens):

        0 ............ num_computed ............ len(table) * block_size
        |-- K and V valid, maybe shared --|-- allocated, own, unwritten --|
                      ^ the block that holds this position is private before it is written: `append` sees to it
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._allocator = BlockAllocator(config.num_blocks)
        self._ref_counts = array.array("i", bytes(4 * config.num_blocks))
        self._tables: dict[int, BlockTable] = {}
        self._prefix_cache = PrefixCache() if config.enable_prefix_caching else None

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self._allocator.num_free

    def block_table(self, seq: Sequence) -> BlockTable:
        return self._tables[seq.seq_id]

    def holds(self, seq: Sequence) -> bool:
        return seq.seq_id in self._tables

    # Admission

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether all known tokens of the group fit beside the running ones: the trunk once, then each own tail."""
        shared = group.fork_point // self.config.block_size
        own = [
            self.config.blocks_for(seq.num_tokens) - shared
            for seq in group.live_seqs
            if seq.num_tokens > group.fork_point
        ]
        # The trunk's last, partly filled block goes on as the tail of one sequence; the others copy it.
        inherited = 1 if own and group.fork_point % self.config.block_size else 0
        spare = sum(own) - inherited + int(WATERMARK * self.config.num_blocks)
        return self.can_allocate(group.live_seqs[0], group.root_hash, group.fork_point, spare)

    def admit(self, group: SequenceGroup) -> int:
        """`allocate` for the group's trunk."""
        return self.allocate(group.live_seqs[0], group.root_hash, group.fork_point)

    def can_allocate(self, seq: Sequence, root_hash: bytes, num_tokens: int, num_spare: int = 0) -> bool:
        """Whether `allocate` would succeed and leave `num_spare` blocks free."""
        # Hits that another sequence holds cost nothing; hits that lie free must be taken like any other.
        hits = self._match_prefix(seq, root_hash, num_tokens)
        held = sum(not self._allocator.is_free(block) for block in hits)
        return self.config.blocks_for(num_tokens) - held + num_spare <= self.num_free_blocks

    def allocate(self, seq: Sequence, root_hash: bytes, num_tokens: int) -> int:
        """Give a sequence without blocks all it needs for its first `num_tokens` tokens.

        Full blocks whose content is cached are shared rather than computed, but for the one that holds the last
        token: at least one token is always computed, and no cached block is ever written.

        Returns:
            How many leading tokens were found in the cache; `num_computed_tokens` is set to it.
        """
        assert not self.holds(seq)
        assert 0 < num_tokens <= seq.num_tokens
        hits = self._match_prefix(seq, root_hash, num_tokens)
        table = BlockTable(num_hashed_blocks=len(hits))
        for block in hits:
            self._share(block)
            table.append(block)
        for _ in range(self.config.blocks_for(num_tokens) - len(hits)):
            table.append(self._take_free())
        self._tables[seq.seq_id] = table
        seq.num_computed_tokens = len(hits) * self.config.block_size
        return seq.num_computed_tokens

    # Growth

    def num_blocks_to_append(self, writes: Iterable[tuple[Sequence, int]]) -> int:
        """Free blocks that appending `num_new` tokens to each sequence takes, copies-on-write included."""
        grown = 0
        writers: Counter[int] = Counter()
        for seq, num_new in writes:
            table = self._tables[seq.seq_id]
            grown += max(0, self.config.blocks_for(seq.num_computed_tokens + num_new) - len(table))
            index = seq.num_computed_tokens // self.config.block_size
            if index < len(table):
                writers[table[index]] += 1
        # Of the tables that share a block, all that write copy it, except that a last remaining holder keeps it.
        copied = sum(min(count, self._ref_counts[block] - 1) for block, count in writers.items())
        return grown + copied

    def append(self, seq: Sequence, num_new: int) -> list[BlockCopy]:
        """Make room for the next `num_new` tokens. The caller has checked `num_blocks_to_append`.

        Returns:
            The copies that must happen before this step writes: of the block in which they start, if it was shared
            (§4.4).
        """
        table = self._tables[seq.seq_id]
        copies = []
        index = seq.num_computed_tokens // self.config.block_size
        if index < len(table) and self._ref_counts[table[index]] > 1:
            copy = BlockCopy(table[index], self._take_free())
            self._release(copy.source)
            table.replace(index, copy.destination)
            copies.append(copy)
        while len(table) * self.config.block_size < seq.num_computed_tokens + num_new:
            table.append(self._take_free())
        return copies

    def cache_full_blocks(self, seq: Sequence, root_hash: bytes) -> None:
        """Offer blocks that have become full to the prefix cache. Call it when `num_computed_tokens` has grown."""
        if self._prefix_cache is None:
            return
        table = self._tables[seq.seq_id]
        num_full = seq.num_computed_tokens // self.config.block_size
        if num_full > table.num_hashed_blocks:
            self._hash(seq, root_hash, num_full)
            for index in range(table.num_hashed_blocks, num_full):
                self._prefix_cache.insert(seq.block_hashes[index], table[index])
            table.num_hashed_blocks = num_full

    # Sharing and release

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, without blocks, share all of `parent`'s (§4.4)."""
        assert not self.holds(child)
        table = self._tables[parent.seq_id]
        assert len(table) == self.config.blocks_for(parent.num_computed_tokens), "fork of unwritten blocks"
        for block in table.blocks.tolist():
            self._ref_counts[block] += 1
        self._tables[child.seq_id] = table.fork()
        child.num_computed_tokens = parent.num_computed_tokens
        num_common = child.num_computed_tokens // self.config.block_size
        child.block_hashes = parent.block_hashes[:num_common]

    def hand_over(self, seq: Sequence, heir: Sequence) -> None:
        """Give all of a sequence's blocks to one without any, whose tokens are the same as far as they are computed."""
        assert not self.holds(heir)
        self._tables[heir.seq_id] = self._tables.pop(seq.seq_id)
        heir.num_computed_tokens = seq.num_computed_tokens
        heir.block_hashes = seq.block_hashes[: seq.num_computed_tokens // self.config.block_size]

    def free(self, seq: Sequence) -> None:
        """Drop a sequence's references; a no-op if it holds none."""
        table = self._tables.pop(seq.seq_id, None)
        if table is None:
            return
        # The tail first: of a cached chain, the end is the least useful and goes first.
        for block in reversed(table.blocks.tolist()):
            self._release(block)

    def reset_prefix_cache(self) -> None:
        """Forget all cached content; blocks in use stay with their sequences."""
        if self._prefix_cache is not None:
            self._prefix_cache.clear()

    # Internals

    def _hash(self, seq: Sequence, root_hash: bytes, num_blocks: int) -> None:
        known = len(seq.block_hashes)
        if known < num_blocks:
            size = self.config.block_size
            parent = seq.block_hashes[-1] if known else root_hash
            tokens = seq.token_ids[known * size : num_blocks * size]
            seq.block_hashes.extend(hash_blocks(parent, tokens, size))

    def _match_prefix(self, seq: Sequence, root_hash: bytes, num_tokens: int) -> list[int]:
        """Cached blocks of the longest cached prefix, short of the block that holds token `num_tokens - 1`."""
        hits: list[int] = []
        if self._prefix_cache is None:
            return hits
        limit = (num_tokens - 1) // self.config.block_size
        self._hash(seq, root_hash, limit)
        for block_hash in seq.block_hashes[:limit]:
            block = self._prefix_cache.find(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def _share(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            self._allocator.take(block)
        self._ref_counts[block] += 1

    def _take_free(self) -> int:
        block = self._allocator.allocate()
        if self._prefix_cache is not None:
            self._prefix_cache.remove(block)
        self._ref_counts[block] = 1
        return block

    def _release(self, block: int) -> None:
        self._ref_counts[block] -= 1
        assert self._ref_counts[block] >= 0
        if self._ref_counts[block] == 0:
            cached = self._prefix_cache is not None and self._prefix_cache.hash_of(block) is not None
            self._allocator.free(block, reuse_last=cached)

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is accounted for exactly once. O(blocks)."""
        named: Counter[int] = Counter()
        for table in self._tables.values():
            blocks = table.blocks.tolist()
            assert len(set(blocks)) == len(blocks), "a table names a block twice"
            named.update(blocks)
        free = self._allocator.free_blocks()
        assert len(free) == self._allocator.num_free == len(set(free))
        assert all(self._ref_counts[block] == named[block] for block in range(self.config.num_blocks))
        assert set(free) == {block for block in range(self.config.num_blocks) if named[block] == 0}
        if self._prefix_cache is not None:
            self._prefix_cache.check_invariants()
