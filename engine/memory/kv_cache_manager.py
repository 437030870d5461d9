"""The one owner of KV blocks: block tables, reference counts, sharing and copy-on-write (§4.2–4.4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from engine.config import CacheConfig
from engine.memory.block_copy import BlockCopy
from engine.memory.block_events import BlockEvents
from engine.memory.block_hash import hash_blocks
from engine.memory.block_table import BlockTable
from engine.memory.device_block_pool import DeviceBlockPool
from engine.memory.swap_space import SwapSpace
from engine.sequence import Sequence, SequenceGroup

# Blocks kept free when a group is admitted beside running ones, as a share of the pool: what the running groups
# need next, so that an admission is not paid for with a preemption in the following step.
WATERMARK = 0.01


class KVCacheManager:
    """Maps sequences to physical blocks. Nothing else changes a reference count or a block table.

    Ownership of a sequence's index range [0, num_tokens):

        0 ............ num_computed ............ len(table) * block_size
        |-- K and V valid, maybe shared --|-- allocated, own, unwritten --|
                      ^ the block that holds this position is private before it is written: `append` sees to it
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self._tables: dict[int, BlockTable] = {}
        self._pool = DeviceBlockPool(config.num_blocks, config.enable_prefix_caching)
        self._swap_space = SwapSpace(config, self._pool, self._tables)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self._pool.num_free

    @property
    def num_empty_blocks(self) -> int:
        """Free blocks without cached content: handing them out loses nothing."""
        return self._pool.num_empty

    def block_table(self, seq: Sequence) -> BlockTable:
        return self._tables[seq.seq_id]

    @property
    def num_free_swap_blocks(self) -> int:
        return self._swap_space.num_free

    @property
    def num_pinned_blocks(self) -> int:
        return len(self._pool.pinned)

    def holds(self, seq: Sequence) -> bool:
        """Whether the sequence has a block table, on the device or swapped out."""
        return seq.seq_id in self._tables or self._swap_space.holds(seq)

    # Admission

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether all known tokens of the group fit beside the running ones: the trunk once, then each own tail."""
        watermark = int(WATERMARK * self.config.num_blocks)
        if group.is_swapped:
            # Each sequence may need a block to go on, by growing or by copying a shared one.
            needed = self.num_blocks_to_swap_in(group.live_seqs) + len(group.live_seqs)
            return needed + watermark <= self.num_free_blocks
        shared = group.fork_point // self.config.block_size
        own = [
            self.config.blocks_for(seq.num_tokens) - shared
            for seq in group.live_seqs
            if seq.num_tokens > group.fork_point
        ]
        # The trunk's last, partly filled block goes on as the tail of one sequence; the others copy it.
        inherited = 1 if own and group.fork_point % self.config.block_size else 0
        spare = sum(own) - inherited + watermark
        return self.can_allocate(group.live_seqs[0], group.root_hash, group.fork_point, spare)

    def admit(self, group: SequenceGroup) -> int:
        """`allocate` for the group's trunk."""
        return self.allocate(group.live_seqs[0], group.root_hash, group.fork_point)

    def num_cached_tokens(self, group: SequenceGroup) -> int:
        """What `admit` would find of a group without blocks. Looks on from where the last look ended, so that asking at
        every step costs next to nothing."""
        cache = self._pool.prefix_cache
        if cache is None:
            return 0
        seq = group.live_seqs[0]
        limit = (group.fork_point - 1) // self.config.block_size
        self._hash(seq, group.root_hash, limit)
        end = min(group.num_prefix_blocks, limit)
        # A chain loses its end first.
        while end > 0 and cache.find(seq.block_hashes[end - 1]) is None:
            end -= 1
        while end < limit and cache.find(seq.block_hashes[end]) is not None:
            end += 1
        group.num_prefix_blocks = end
        return end * self.config.block_size

    def can_allocate(self, seq: Sequence, root_hash: bytes, num_tokens: int, num_spare: int = 0) -> bool:
        """Whether `allocate` would succeed and leave `num_spare` blocks free."""
        # Hits that another sequence holds cost nothing; hits that lie free must be taken like any other.
        hits = self._match_prefix(seq, root_hash, num_tokens)
        held = sum(not self._pool.is_free(block) for block in hits)
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
            self._pool.share(block)
            table.append(block)
        for _ in range(self.config.blocks_for(num_tokens) - len(hits)):
            table.append(self._pool.allocate())
        self._tables[seq.seq_id] = table
        seq.num_computed_tokens = len(hits) * self.config.block_size
        return seq.num_computed_tokens

    # Growth

    def num_blocks_to_append(self, writes: Iterable[tuple[Sequence, int]]) -> int:
        """Free blocks that appending `num_new` tokens to each sequence takes, copies-on-write included."""
        block_size = self.config.block_size
        needed = 0
        writers: dict[int, int] = {}
        for seq, num_new in writes:
            table = self._tables[seq.seq_id]
            num_slots = len(table) * block_size
            missing = seq.num_computed_tokens + num_new - num_slots
            if missing > 0:
                needed += -(-missing // block_size)
            if seq.num_computed_tokens < num_slots:
                block = table[seq.num_computed_tokens // block_size]
                # Of the tables that share a block, all that write copy it, but for the last remaining holder.
                num_before = writers.get(block, 0)
                writers[block] = num_before + 1
                needed += num_before + 1 < self._pool.ref_counts[block]
        return needed

    def append(self, seq: Sequence, num_new: int) -> list[BlockCopy]:
        """Make room for the next `num_new` tokens. The caller has checked `num_blocks_to_append`.

        Returns:
            The copies that must happen before this step writes: of the block in which they start, if it was shared
            (§4.4).
        """
        table = self._tables[seq.seq_id]
        block_size = self.config.block_size
        copies = []
        index = seq.num_computed_tokens // block_size
        if index < len(table) and self._pool.ref_counts[table[index]] > 1:
            copy = BlockCopy(table[index], self._pool.allocate())
            self._pool.release(copy.source)
            table[index] = copy.destination  # copy-on-write (§4.4)
            copies.append(copy)
        while len(table) * block_size < seq.num_computed_tokens + num_new:
            table.append(self._pool.allocate())
        return copies

    def cache_full_blocks(self, seq: Sequence, root_hash: bytes, num_tokens: int | None = None) -> None:
        """Offer blocks that have become full to the prefix cache. Call it when `num_computed_tokens` has grown.

        Args:
            num_tokens: only blocks of these leading tokens; None means of all that are computed.
        """
        prefix_cache = self._pool.prefix_cache
        if prefix_cache is None:
            return
        table = self._tables[seq.seq_id]
        computed = seq.num_computed_tokens
        num_full = (computed if num_tokens is None else min(computed, num_tokens)) // self.config.block_size
        if num_full > table.num_hashed_blocks:
            self._hash(seq, root_hash, num_full)
            for index in range(table.num_hashed_blocks, num_full):
                prefix_cache.insert(seq.block_hashes[index], table[index])
            table.num_hashed_blocks = num_full

    # Sharing and release

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, without blocks, share all of `parent`'s (§4.4)."""
        assert not self.holds(child)
        table = self._tables[parent.seq_id]
        assert len(table) == self.config.blocks_for(parent.num_computed_tokens), "fork of unwritten blocks"
        for block in table.blocks.tolist():
            self._pool.share(block)
        self._tables[child.seq_id] = table.fork()
        child.num_computed_tokens = parent.num_computed_tokens
        num_common = child.num_computed_tokens // self.config.block_size
        child.block_hashes = parent.block_hashes[:num_common]

    def hand_over(self, seq: Sequence, heir: Sequence) -> None:
        """Give all of a sequence's blocks to one without any, whose tokens are the same as far as they are computed."""
        assert not self.holds(heir)
        if seq.seq_id in self._tables:
            self._tables[heir.seq_id] = self._tables.pop(seq.seq_id)
        else:
            self._swap_space.hand_over(seq, heir)
        heir.num_computed_tokens = seq.num_computed_tokens
        heir.block_hashes = seq.block_hashes[: seq.num_computed_tokens // self.config.block_size]

    def free(self, seq: Sequence) -> None:
        """Drop a sequence's references; a no-op if it holds none."""
        self._swap_space.free(seq)
        table = self._tables.pop(seq.seq_id, None)
        if table is None:
            return
        # The tail first: of a cached chain, the end is the least useful and goes first.
        for block in reversed(table.blocks.tolist()):
            self._pool.release(block)

    def pin(self, seq: Sequence) -> None:
        """Keep a sequence's blocks on the device for good: no preemption takes them (a named shared prefix, §4.4)."""
        self._pool.pinned.update(self._tables[seq.seq_id].blocks.tolist())

    # Swapping (§4.5). A group goes out and comes in whole.

    def swap_blocks(self, seqs: Iterable[Sequence]) -> list[int]:
        """Distinct device blocks with computed tokens that swapping these sequences out would copy."""
        return self._swap_space.blocks_of(seqs)

    def can_swap_out(self, seqs: SequenceOf[Sequence]) -> bool:
        """Whether there is anything to move, and room for it on the host."""
        return 0 < len(self.swap_blocks(seqs)) <= self.num_free_swap_blocks

    def swap_out(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Move a group's computed blocks to the host, each once, sharing kept; the caller has checked `can_swap_out`.

        Returns:
            Copies (device block, host block) that must happen before this step writes anything.
        """
        return self._swap_space.swap_out(seqs)

    def num_blocks_to_swap_in(self, seqs: Iterable[Sequence]) -> int:
        """Free device blocks that `swap_in` takes."""
        return self._swap_space.num_blocks_to_swap_in(seqs)

    def swap_in(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Bring a group back: full blocks that are still cached are shared again, the rest is copied, each once.

        Returns:
            Copies (host block, device block) that must happen before this step reads or writes anything.
        """
        return self._swap_space.swap_in(seqs)

    # What preempting a group would set free, and what of it others keep

    def num_exclusive_blocks(self, seqs: SequenceOf[Sequence]) -> int:
        """Distinct device blocks that nobody but these sequences names: what preempting them sets free."""
        return sum(self._pool.ref_counts[block] == count for block, count in self._named_by(seqs).items())

    def num_blocks_held_by_others(self, seqs: SequenceOf[Sequence], num_blocks: int) -> int:
        """Of the first sequence's leading `num_blocks`, those that sequences other than these name too."""
        named = self._named_by(seqs)
        first = next((self._tables[seq.seq_id] for seq in seqs if seq.seq_id in self._tables), BlockTable())
        leading = first.blocks[:num_blocks].tolist()
        return sum(self._pool.ref_counts[block] > named[block] for block in leading)

    def _named_by(self, seqs: SequenceOf[Sequence]) -> Counter[int]:
        named: Counter[int] = Counter()
        for seq in seqs:
            if seq.seq_id in self._tables:
                named.update(self._tables[seq.seq_id].blocks.tolist())
        return named

    def reset_prefix_cache(self) -> None:
        """Forget all cached content but the pinned; blocks in use stay with their sequences."""
        self._pool.reset_prefix_cache()

    def watch_blocks(self) -> BlockEvents | None:
        """Record what is cached and dropped from now on; None without a prefix cache."""
        return self._pool.prefix_cache.watch() if self._pool.prefix_cache is not None else None

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
        if self._pool.prefix_cache is None:
            return []
        limit = (num_tokens - 1) // self.config.block_size
        self._hash(seq, root_hash, limit)
        return self._pool.find_prefix(seq.block_hashes[:limit])

    def check_invariants(self) -> None:
        """Raise AssertionError unless every block is accounted for exactly once. O(blocks)."""
        named = self._swap_space.pinned_names()
        for table in self._tables.values():
            blocks = table.blocks.tolist()
            assert len(set(blocks)) == len(blocks), "a table names a block twice"
            named.update(blocks)
        self._pool.check_invariants(named)
        self._swap_space.check_invariants()
