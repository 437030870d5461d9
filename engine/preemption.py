"""Swap or recompute? The cheaper way to take a group's blocks away and bring them back (§4.5, §7.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine.compute_cost import ComputeCost
from engine.config import CacheConfig, Preemption
from engine.memory import KVCache
from engine.sequence import PreemptedBlocks, SequenceGroup

# Weight of what was known before a group comes back: what is old counts for less, as load and batches change.
_DECAY = 0.96


class SwapCost(NamedTuple):
    """What moving blocks costs: bytes of one block, and bytes a second from device to host and back."""

    block_bytes: int
    out_bytes_per_s: float
    in_bytes_per_s: float


class PreemptionPolicy:
    """Answers the scheduler's question, group by group.

    Args:
        mode: "swap" and "recompute" are answers for all groups; "auto" compares the two in seconds.
        swap_cost: tells what moving blocks costs, None without a swap pool; asked when the first group is preempted,
            since it is measured after the engine is put together.
    """

    def __init__(
        self,
        mode: Preemption,
        kv_cache: KVCache,
        cache_config: CacheConfig,
        swap_cost: Callable[[], SwapCost | None],
    ) -> None:
        self.compute_cost = ComputeCost()
        self._mode = mode
        self._kv_cache = kv_cache
        self._block_size = cache_config.block_size
        self._has_swap_pool = cache_config.num_swap_blocks > 0
        self._swap_cost = swap_cost
        # Blocks that groups gave up and nobody else held, and how many of them were still cached when they were wanted
        # again. Groups are preempted because blocks run short, so until one has come back, none is expected to be.
        self._num_own_blocks = 1.0
        self._num_own_blocks_found = 0.0

    def prefers_swap(self, group: SequenceGroup) -> bool:
        """Whether swapping this group out and in takes less time than computing its tokens again."""
        if not self._has_swap_pool or self._mode == "recompute":
            return False
        return self._mode == "swap" or self.swap_seconds(group) < self.recompute_seconds(group)

    def observe_preemption(self, group: SequenceGroup, swapped: bool) -> None:
        """A group is about to lose its blocks: keep on it what has to be known when it comes back."""
        if self._mode != "auto":
            return
        live = group.live_seqs
        if swapped:
            num_blocks = len(self._kv_cache.swap_blocks(live))
            num_held = max(0, num_blocks - self._kv_cache.num_exclusive_blocks(live))
        else:
            num_blocks = self._computed_trunk(group) // self._block_size
            num_held = self._kv_cache.num_blocks_held_by_others(live, num_blocks)
        group.preempted_blocks = PreemptedBlocks(num_blocks, num_held)

    def observe_swap_in(self, group: SequenceGroup, num_copied: int) -> None:
        """A group came back from the host: all but `num_copied` of its blocks were still cached on the device."""
        if group.preempted_blocks is not None:
            self._observe_return(group.preempted_blocks, group.preempted_blocks.num_blocks - num_copied)

    def observe_recomputation(self, group: SequenceGroup, num_cached_tokens: int) -> None:
        """A group was admitted again, and so many of its leading tokens were still cached."""
        if group.preempted_blocks is not None:
            self._observe_return(group.preempted_blocks, num_cached_tokens // self._block_size)

    def _observe_return(self, preempted: PreemptedBlocks, num_found: int) -> None:
        # What others held is found again because they hold it, which says nothing of what becomes of blocks that
        # nobody holds: it is left out here, as each price counts it apart.
        num_own = preempted.num_blocks - preempted.num_held_by_others
        num_own_found = min(num_own, max(0, num_found - preempted.num_held_by_others))
        self._num_own_blocks = _DECAY * self._num_own_blocks + num_own
        self._num_own_blocks_found = _DECAY * self._num_own_blocks_found + num_own_found

    def swap_seconds(self, group: SequenceGroup) -> float:
        """Each block goes out once; those that others hold, or that stay cached, need not come in."""
        cost = self._swap_cost()
        assert cost is not None
        num_out = len(self._kv_cache.swap_blocks(group.live_seqs))
        num_exclusive = self._kv_cache.num_exclusive_blocks(group.live_seqs)
        num_in = num_exclusive * (1.0 - self._returned_share)
        return cost.block_bytes * (num_out / cost.out_bytes_per_s + num_in / cost.in_bytes_per_s)

    def recompute_seconds(self, group: SequenceGroup) -> float:
        """The trunk once, less what the prefix cache gives back, and each sequence's tail."""
        live = group.live_seqs
        trunk = self._computed_trunk(group)
        tails = sum(max(0, seq.num_computed_tokens - trunk) for seq in live)
        num_blocks = trunk // self._block_size
        num_held = self._kv_cache.num_blocks_held_by_others(live, num_blocks)
        num_cached = num_held + (num_blocks - num_held) * self._returned_share
        return self.compute_cost.seconds(trunk - num_cached * self._block_size + tails)

    @staticmethod
    def _computed_trunk(group: SequenceGroup) -> int:
        """Computed tokens that all live sequences have in common."""
        return min(group.common_prefix_length(), max(seq.num_computed_tokens for seq in group.live_seqs))

    @property
    def _returned_share(self) -> float:
        """Of what is dropped and held by nobody else, the share expected to be found again."""
        return self._num_own_blocks_found / self._num_own_blocks
