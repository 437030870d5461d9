"""What the scheduler asks of KV memory, whichever way it is managed."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from engine.config import CacheConfig, EngineConfig
from engine.memory.block_copy import BlockCopy
from engine.memory.block_events import BlockEvents
from engine.memory.block_table import BlockTable
from engine.memory.kv_cache_manager import KVCacheManager
from engine.memory.reservation import ReservationPolicy
from engine.memory.reserving_manager import ReservingManager
from engine.sequence import Sequence, SequenceGroup


class KVCache(Protocol):
    """The owner of all KV blocks: KVCacheManager pages them on demand, ReservingManager reserves them ahead."""

    @property
    def num_free_blocks(self) -> int: ...

    @property
    def num_empty_blocks(self) -> int:
        """Free blocks without cached content."""

    def block_table(self, seq: Sequence) -> BlockTable: ...

    def holds(self, seq: Sequence) -> bool: ...

    def can_admit(self, group: SequenceGroup) -> bool:
        """Whether the group may be admitted beside those that run."""

    def admit(self, group: SequenceGroup) -> int:
        """Give the group's trunk what it computes in; the leading tokens found in a cache."""

    def num_cached_tokens(self, group: SequenceGroup) -> int:
        """Leading tokens that `admit` would find in a cache now, as far as a cheap look can tell."""

    def allocate(self, seq: Sequence, root_hash: bytes, num_tokens: int) -> int:
        """Give a sequence without blocks all it needs for its first tokens; those found in a cache."""

    def num_blocks_to_append(self, writes: Iterable[tuple[Sequence, int]]) -> int:
        """Free blocks that appending so many new tokens to each sequence takes."""

    def append(self, seq: Sequence, num_new: int) -> SequenceOf[BlockCopy]:
        """Make room for the next tokens; the copies that must happen before they are written."""

    def cache_full_blocks(self, seq: Sequence, root_hash: bytes, num_tokens: int | None = None) -> None: ...

    def fork(self, parent: Sequence, child: Sequence) -> None: ...

    def hand_over(self, seq: Sequence, heir: Sequence) -> None: ...

    def free(self, seq: Sequence) -> None: ...

    def pin(self, seq: Sequence) -> None:
        """Keep a sequence's blocks on the device for good."""

    @property
    def num_pinned_blocks(self) -> int: ...

    @property
    def num_free_swap_blocks(self) -> int: ...

    def swap_blocks(self, seqs: SequenceOf[Sequence]) -> list[int]:
        """Distinct device blocks that swapping these sequences out would copy."""

    def can_swap_out(self, seqs: SequenceOf[Sequence]) -> bool: ...

    def swap_out(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]: ...

    def swap_in(self, seqs: SequenceOf[Sequence]) -> list[BlockCopy]: ...

    def num_exclusive_blocks(self, seqs: SequenceOf[Sequence]) -> int:
        """Distinct device blocks that nobody but these sequences names."""

    def num_blocks_held_by_others(self, seqs: SequenceOf[Sequence], num_blocks: int) -> int:
        """Of the first sequence's leading blocks, those that other sequences name too."""

    def reset_prefix_cache(self) -> None: ...

    def watch_blocks(self) -> BlockEvents | None:
        """Record what is cached and dropped from now on; None where nothing is ever cached."""

    def check_invariants(self) -> None: ...


def make_kv_cache(config: EngineConfig, cache_config: CacheConfig, max_model_len: int) -> KVCache:
    """The manager that `config.reservation` asks for."""
    if config.reservation == "paged":
        return KVCacheManager(cache_config)
    return ReservingManager(cache_config, ReservationPolicy(config.reservation, max_model_len))
