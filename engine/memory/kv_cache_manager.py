"""The one owner of KV blocks: block tables, reference counts, sharing and copy-on-write (§4.2–4.4)."""

from __future__ import annotations

import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from engine.config import CacheConfig
from engine.memory.block_allocator import BlockAllocator
from engine.memory.block_hash import hash_blocks
from engine.memory.block_table import BlockTable
from engine.memory.host_block_pool import HostBlockPool
from engine.memory.prefix_cache import PrefixCache
from engine.sequence import Sequence, SequenceGroup

# Blocks kept free when a group is admitted beside running ones, as a share of the pool: what the running groups
# need next, so that an admission is not paid for with a preemption in the following step.
WATERMARK = 0.01


class BlockCopy(NamedTuple):
    """Copy a whole block before this step's writes: copy-on-write within the pool, or a swap to or from the host."""

    source: int
    destination: int


class KVCacheManager:
    """Maps sequences to physical blocks. Nothing else changes a reference count or a block table.

    A block's reference count is the number of block tables that name it. At 0 it is free; if the prefix cache knows
    its content, it stays findable until it is handed out again, the least recently used first.

    A swapped-out sequence's table names blocks of the host pool, which are counted in the same way; its pinned
    blocks, which never leave the device, it goes on naming as `~block`.

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
        self._host = HostBlockPool(config.num_swap_blocks)
        self._swapped: dict[int, BlockTable] = {}
        self._pinned: set[int] = set()
        self._prefix_cache = PrefixCache() if config.enable_prefix_caching else None

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now, cached ones included."""
        return self._allocator.num_free

    def block_table(self, seq: Sequence) -> BlockTable:
        return self._tables[seq.seq_id]

    @property
    def num_free_swap_blocks(self) -> int:
        return self._host.num_free

    @property
    def num_pinned_blocks(self) -> int:
        return len(self._pinned)

    def holds(self, seq: Sequence) -> bool:
        """Whether the sequence has a block table, on the device or swapped out."""
        return seq.seq_id in self._tables or seq.seq_id in self._swapped

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
                needed += num_before + 1 < self._ref_counts[block]
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
        if index < len(table) and self._ref_counts[table[index]] > 1:
            copy = BlockCopy(table[index], self._take_free())
            self._release(copy.source)
            table[index] = copy.destination  # copy-on-write (§4.4)
            copies.append(copy)
        while len(table) * block_size < seq.num_computed_tokens + num_new:
            table.append(self._take_free())
        return copies

    def cache_full_blocks(self, seq: Sequence, root_hash: bytes, num_tokens: int | None = None) -> None:
        """Offer blocks that have become full to the prefix cache. Call it when `num_computed_tokens` has grown.

        Args:
            num_tokens: only blocks of these leading tokens; None means of all that are computed.
        """
        if self._prefix_cache is None:
            return
        table = self._tables[seq.seq_id]
        computed = seq.num_computed_tokens
        num_full = (computed if num_tokens is None else min(computed, num_tokens)) // self.config.block_size
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
        tables = self._tables if seq.seq_id in self._tables else self._swapped
        tables[heir.seq_id] = tables.pop(seq.seq_id)
        heir.num_computed_tokens = seq.num_computed_tokens
        heir.block_hashes = seq.block_hashes[: seq.num_computed_tokens // self.config.block_size]

    def free(self, seq: Sequence) -> None:
        """Drop a sequence's references; a no-op if it holds none."""
        swapped = self._swapped.pop(seq.seq_id, None)
        if swapped is not None:
            self._release_swapped(swapped)
        table = self._tables.pop(seq.seq_id, None)
        if table is None:
            return
        # The tail first: of a cached chain, the end is the least useful and goes first.
        for block in reversed(table.blocks.tolist()):
            self._release(block)

    def pin(self, seq: Sequence) -> None:
        """Keep a sequence's blocks on the device for good: no preemption takes them (a named shared prefix, §4.4)."""
        self._pinned.update(self._tables[seq.seq_id].blocks.tolist())

    # Swapping (§4.5). A group goes out and comes in whole.

    def swap_blocks(self, seqs: Iterable[Sequence]) -> list[int]:
        """Distinct device blocks with computed tokens that swapping these sequences out would copy."""
        blocks: dict[int, None] = {}
        for seq in seqs:
            if seq.seq_id in self._tables:
                num_computed = self.config.blocks_for(seq.num_computed_tokens)
                blocks.update(dict.fromkeys(self._tables[seq.seq_id].blocks[:num_computed].tolist()))
        return [block for block in blocks if block not in self._pinned]

    def num_exclusive_blocks(self, seqs: SequenceOf[Sequence]) -> int:
        """Distinct device blocks that nobody but these sequences names: what preempting them sets free."""
        return sum(self._ref_counts[block] == count for block, count in self._named_by(seqs).items())

    def num_blocks_held_by_others(self, seqs: SequenceOf[Sequence], num_blocks: int) -> int:
        """Of the first sequence's leading `num_blocks`, those that sequences other than these name too."""
        named = self._named_by(seqs)
        first = next((self._tables[seq.seq_id] for seq in seqs if seq.seq_id in self._tables), BlockTable())
        leading = first.blocks[:num_blocks].tolist()
        return sum(self._ref_counts[block] > named[block] for block in leading)

    def _named_by(self, seqs: SequenceOf[Sequence]) -> Counter[int]:
        named: Counter[int] = Counter()
        for seq in seqs:
            if seq.seq_id in self._tables:
                named.update(self._tables[seq.seq_id].blocks.tolist())
        return named

    def can_swap_out(self, seqs: SequenceOf[Sequence]) -> bool:
        return len(self.swap_blocks(seqs)) <= self._host.num_free

    def swap_out(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Move a group's computed blocks to the host, each once, sharing kept; the caller has checked `can_swap_out`.

        Returns:
            Copies (device block, host block) that must happen before this step writes anything.
        """
        host_of = {block: self._host.allocate() for block in self.swap_blocks(seqs)}
        for seq in seqs:
            table = self._tables.pop(seq.seq_id, None)
            if table is None:
                continue  # not yet forked: its trunk's blocks are all it has
            num_computed = self.config.blocks_for(seq.num_computed_tokens)
            swapped = BlockTable()
            for block in reversed(table.blocks.tolist()[num_computed:]):
                self._release(block)
            for block in table.blocks.tolist()[:num_computed]:
                if block in self._pinned:
                    swapped.append(~block)
                else:
                    self._host.share(host_of[block])
                    swapped.append(host_of[block])
            self._swapped[seq.seq_id] = swapped
            for block in reversed(table.blocks.tolist()[:num_computed]):
                if block not in self._pinned:
                    self._release(block)
        return [BlockCopy(device, host) for device, host in host_of.items()]

    def num_blocks_to_swap_in(self, seqs: Iterable[Sequence]) -> int:
        """Free device blocks that `swap_in` takes: hits that lie free count, those that are held do not."""
        hosts = {host: index for seq in seqs for index, host in self._host_blocks(seq)}
        cached = self._cached_on_device(seqs)
        return sum(host not in cached or self._allocator.is_free(cached[host]) for host in hosts)

    def swap_in(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]:
        """Bring a group back: full blocks that are still cached are shared again, the rest is copied, each once.

        Returns:
            Copies (host block, device block) that must happen before this step reads or writes anything.
        """
        device_of = self._cached_on_device(seqs)
        for block in device_of.values():
            self._share(block)
        copies = []
        for seq in seqs:
            for _, host in self._host_blocks(seq):
                if host not in device_of:
                    device_of[host] = self._take_free()
                    copies.append(BlockCopy(host, device_of[host]))
        # One reference was taken for each block above; each table now takes its own, and those are dropped.
        for seq in seqs:
            swapped = self._swapped.pop(seq.seq_id, None)
            if swapped is None:
                continue
            table = BlockTable()
            for entry in swapped.blocks.tolist():
                block = ~entry if entry < 0 else device_of[entry]
                self._ref_counts[block] += entry >= 0
                table.append(block)
            self._tables[seq.seq_id] = table
            self._host.release(entry for entry in swapped.blocks.tolist() if entry >= 0)
        for block in device_of.values():
            self._release(block)
        return copies

    def _host_blocks(self, seq: Sequence) -> list[tuple[int, int]]:
        """(index in the table, host block) of a swapped-out sequence."""
        swapped = self._swapped.get(seq.seq_id)
        if swapped is None:
            return []
        return [(index, entry) for index, entry in enumerate(swapped.blocks.tolist()) if entry >= 0]

    def _cached_on_device(self, seqs: Iterable[Sequence]) -> dict[int, int]:
        """Host block → device block with the same content, where the prefix cache still knows one."""
        cached: dict[int, int] = {}
        if self._prefix_cache is not None:
            for seq in seqs:
                for index, host in self._host_blocks(seq):
                    if index < len(seq.block_hashes) and host not in cached:
                        block = self._prefix_cache.find(seq.block_hashes[index])
                        if block is not None:
                            cached[host] = block
        return cached

    def _release_swapped(self, swapped: BlockTable) -> None:
        entries = swapped.blocks.tolist()
        self._host.release(entry for entry in entries if entry >= 0)
        for entry in entries:
            if entry < 0:
                self._release(~entry)

    def reset_prefix_cache(self) -> None:
        """Forget all cached content but the pinned; blocks in use stay with their sequences."""
        if self._prefix_cache is not None:
            pinned = {block: self._prefix_cache.hash_of(block) for block in self._pinned}
            self._prefix_cache.clear()
            for block, block_hash in pinned.items():
                if block_hash is not None:
                    self._prefix_cache.insert(block_hash, block)

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
        on_host: Counter[int] = Counter()
        for table in self._swapped.values():
            entries = table.blocks.tolist()
            on_host.update(entry for entry in entries if entry >= 0)
            named.update(~entry for entry in entries if entry < 0)
        assert self._tables.keys().isdisjoint(self._swapped)
        assert all(named[block] > 0 for block in self._pinned), "a pinned block is held by nobody"
        self._host.check_invariants(on_host)
        free = self._allocator.free_blocks()
        assert len(free) == self._allocator.num_free == len(set(free))
        assert all(self._ref_counts[block] == named[block] for block in range(self.config.num_blocks))
        assert set(free) == {block for block in range(self.config.num_blocks) if named[block] == 0}
        if self._prefix_cache is not None:
            self._prefix_cache.check_invariants()
