"""What the slots of the KV pool are held for: the kinds of the paper's Figures 2 and 3."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from engine.memory.kv_cache import KVCache
from engine.memory.kv_cache_manager import KVCacheManager
from engine.memory.reservation import final_length
from engine.memory.reserving_manager import ReservingManager
from engine.sequence import Sequence, SequenceGroup


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """The KV pool between two steps, in token slots. The first six kinds add up to the pool.

    Which slots a sequence will fill depends on its final length. It is known where the request fixes it (`ignore_eos`
    and no stop strings or tokens); any other sequence is taken to run to its limit, so that what it may never fill
    counts as reserved, not as internal fragmentation. The token that ends a sequence never enters the cache.

    Attributes:
        token_states: hold K and V of tokens; those that sequences share count once.
        reserved: held, empty, and to be filled by the sequence that holds them.
        internal_fragmentation: held, and never to be filled: the end of a sequence's last block, or what a
            reservation has beyond the sequence's end.
        rounding: held only because an allocator rounds: a contiguous run's size beyond what was asked for. The paper's
            Figure 2 shows it among "external fragmentation & others"; 0 with paging.
        external_fragmentation: free, in runs too short for the next admission: the oldest waiting request's, or with
            none waiting, the smallest that could come; 0 with paging.
        free: free otherwise, prefix-cached content included.
        logical_blocks: entries of all block tables.
        physical_blocks: blocks held, a shared one once; pinned prefixes are among them even if nobody names them.
    """

    token_states: int
    reserved: int
    internal_fragmentation: int
    rounding: int
    external_fragmentation: int
    free: int
    logical_blocks: int
    physical_blocks: int

    @property
    def num_slots(self) -> int:
        """Slots of the pool."""
        return self.held + self.external_fragmentation + self.free

    @property
    def held(self) -> int:
        """Slots that no one else can take now."""
        return self.token_states + self.reserved + self.internal_fragmentation + self.rounding

    @property
    def sharing(self) -> int:
        """Blocks saved: what the sequences would hold more if each had its own."""
        return self.logical_blocks - self.physical_blocks

    @property
    def sharing_fraction(self) -> float:
        """Blocks saved as a fraction of the blocks without sharing (Fig. 15); 0 when nothing runs."""
        return self.sharing / self.logical_blocks if self.logical_blocks else 0.0


def measure_memory(
    kv_cache: KVCache, running: Iterable[SequenceGroup], waiting: SequenceOf[SequenceGroup], max_model_len: int
) -> MemoryUsage:
    """Account for every slot of the pool. O(sequences of the running groups); call it between two steps."""
    if isinstance(kv_cache, KVCacheManager):
        return _measure_paged(kv_cache, running, max_model_len)
    assert isinstance(kv_cache, ReservingManager)
    return _measure_reserved(kv_cache, running, waiting[0] if waiting else None)


@dataclass(slots=True)
class _Tail:
    """A partly filled block: slots filled so far, and those that the holder which goes furthest will have filled."""

    filled: int
    will_fill: int


def _measure_paged(manager: KVCacheManager, running: Iterable[SequenceGroup], max_model_len: int) -> MemoryUsage:
    """Every held block is full, but for the tails of sequences: count the empty slots of those."""
    block_size = manager.config.block_size
    empty = reserved = logical_blocks = 0
    tails: dict[int, _Tail] = {}
    for group, seq in _holders(running):
        table = manager.block_table(seq)
        logical_blocks += len(table)
        index, filled = divmod(seq.num_computed_tokens, block_size)
        if index == len(table):
            continue
        will_fill = _slots_to_fill(group, seq, max_model_len) - index * block_size
        # Only the block in which the next token goes may be shared; those behind it are the sequence's own.
        tail = tails.setdefault(table[index], _Tail(filled, 0))
        tail.will_fill = max(tail.will_fill, min(will_fill, block_size))
        own = (len(table) - index - 1) * block_size
        empty += own
        reserved += min(own, max(0, will_fill - block_size))
    empty += sum(block_size - tail.filled for tail in tails.values())
    reserved += sum(tail.will_fill - tail.filled for tail in tails.values())
    physical_blocks = manager.config.num_blocks - manager.num_free_blocks
    return MemoryUsage(
        token_states=physical_blocks * block_size - empty,
        reserved=reserved,
        internal_fragmentation=empty - reserved,
        rounding=0,
        external_fragmentation=0,
        free=manager.num_free_blocks * block_size,
        logical_blocks=logical_blocks,
        physical_blocks=physical_blocks,
    )


def _measure_reserved(
    manager: ReservingManager, running: Iterable[SequenceGroup], next_group: SequenceGroup | None
) -> MemoryUsage:
    """Every run belongs to one group, whose sequences are all as long: count by runs."""
    block_size = manager.config.block_size
    token_states = reserved = internal = rounding = logical_blocks = 0
    for group in running:
        reservation = manager.reservation(group)
        live = group.live_seqs
        filled = sum(manager.num_filled_slots(seq) for seq in live)
        logical_blocks += sum(len(manager.block_table(seq)) for seq in live)
        to_fill = reservation.num_runs * _slots_to_fill(group, group.seqs[0], manager.policy.max_model_len)
        asked = reservation.num_runs * reservation.num_tokens
        token_states += filled
        reserved += to_fill - filled
        internal += asked - to_fill
        rounding += reservation.num_runs * reservation.run_blocks * block_size - asked
    unusable = manager.num_unusable_blocks(next_group)
    return MemoryUsage(
        token_states=token_states,
        reserved=reserved,
        internal_fragmentation=internal,
        rounding=rounding,
        external_fragmentation=unusable * block_size,
        free=(manager.num_free_blocks - unusable) * block_size,
        logical_blocks=logical_blocks,
        physical_blocks=logical_blocks,
    )


def _holders(running: Iterable[SequenceGroup]) -> Iterable[tuple[SequenceGroup, Sequence]]:
    return ((group, seq) for group in running for seq in group.seqs_to_compute())


def _slots_to_fill(group: SequenceGroup, seq: Sequence, max_model_len: int) -> int:
    """Slots that the sequence will have filled when it ends: all its tokens but the last."""
    return final_length(seq.num_prompt_tokens, group.sampling_params.max_tokens, max_model_len) - 1
