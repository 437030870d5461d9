"""Swap or recompute? The cheaper way to take a group's blocks away and bring them back (§4.5, §7.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from engine.config import CacheConfig, Preemption
from engine.memory import KVCache
from engine.sequence import SequenceGroup

# Weight of what was known before a new step is taken in: old steps count for less, as load and batches change.
_DECAY = 0.98


class SwapCost(NamedTuple):
    """What moving blocks costs: bytes of one block, and bytes a second from device to host and back."""

    block_bytes: int
    out_bytes_per_s: float
    in_bytes_per_s: float


class ComputeRate:
    """Seconds that one more token adds to a step: the slope of a decayed least-squares line through recent steps.

    The slope, not the mean: a step costs something for being a step, whether tokens are recomputed in it or not.
    """

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a step that computed `num_tokens` and moved no blocks."""
        x, y = float(num_tokens), seconds
        self._n = _DECAY * self._n + 1.0
        self._x = _DECAY * self._x + x
        self._y = _DECAY * self._y + y
        self._xx = _DECAY * self._xx + x * x
        self._xy = _DECAY * self._xy + x * y

    @property
    def seconds_per_token(self) -> float:
        """0.0 before anything was observed."""
        if self._x == 0.0:
            return 0.0
        mean = self._y / self._x
        variance = self._n * self._xx - self._x * self._x
        if variance <= 1e-9 * self._xx * self._n:
            return mean  # all steps were of one size: there is no slope to see
        slope = (self._n * self._xy - self._x * self._y) / variance
        return min(max(slope, 0.0), mean)


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
        self.compute_rate = ComputeRate()
        self._mode = mode
        self._kv_cache = kv_cache
        self._block_size = cache_config.block_size
        self._has_swap_pool = cache_config.num_swap_blocks > 0
        self._swap_cost = swap_cost
        # Of trunk tokens dropped for recomputation: how many there were, and how many of them other groups held then.
        self._num_dropped_tokens = 0.0
        self._num_dropped_held_tokens = 0.0
        # Of those that nobody else held: how many came back, and how many of them were still cached then. Starts as if
        # a little had been seen to come back half cached.
        self.num_returned_tokens = 2.0 * cache_config.block_size if cache_config.enable_prefix_caching else 1.0
        self.num_returned_cached_tokens = 1.0 * cache_config.block_size if cache_config.enable_prefix_caching else 0.0

    def observe_return(self, num_tokens: int, num_cached: int) -> None:
        """A recomputed group came back; `num_cached` of its trunk's `num_tokens` were still cached.

        What others held is found again because they hold it. It is left out, as `recompute_seconds` counts it apart:
        it says nothing of what becomes of blocks that nobody holds. Groups come back after others were
        dropped, so the share that was held is a mean over recent drops.
        """
        num_held = num_tokens * self._num_dropped_held_tokens / max(1.0, self._num_dropped_tokens)
        self.num_returned_tokens = _DECAY * self.num_returned_tokens + num_tokens - num_held
        self.num_returned_cached_tokens = _DECAY * self.num_returned_cached_tokens + num_cached - num_held

    def prefers_swap(self, group: SequenceGroup) -> bool:
        """Whether swapping this group out and in takes less time than computing its tokens again.

        Asked once for each preemption, right before it: what is dropped then is remembered.
        """
        if not self._has_swap_pool or self._mode == "recompute":
            return False
        if self._mode == "swap":
            return True
        if self.swap_seconds(group) < self.recompute_seconds(group):
            return True
        trunk = self._computed_trunk(group)
        num_held = self._kv_cache.num_blocks_held_by_others(group.live_seqs, trunk // self._block_size)
        self._num_dropped_tokens = _DECAY * self._num_dropped_tokens + trunk
        self._num_dropped_held_tokens = _DECAY * self._num_dropped_held_tokens + num_held * self._block_size
        return False

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
        return (trunk - num_cached * self._block_size + tails) * self.compute_rate.seconds_per_token

    @staticmethod
    def _computed_trunk(group: SequenceGroup) -> int:
        """Computed tokens that all live sequences have in common."""
        return min(group.common_prefix_length(), max(seq.num_computed_tokens for seq in group.live_seqs))

    @property
    def _returned_share(self) -> float:
        """Of what is dropped and held by nobody else, the share expected to be found again."""
        return min(1.0, max(0.0, self.num_returned_cached_tokens / self.num_returned_tokens))
