"""Contiguous runs of KV blocks by the buddy system (Knowlton, 1965): what the paper's Orca baselines use (§6.1)."""

from __future__ import annotations


class BuddyAllocator:
    """Hands out runs of 2^k contiguous blocks, each aligned to its own size; O(log num_blocks) an operation.

    A run too large is split into two halves, buddies, and a freed run whose buddy is free too merges with it. The
    buddy of a run differs from it in one bit of the address:

        order 2   [0 . . . . . . 3][4 . . . . . . 7]
        order 1   [0 . . 1][2 . . 3][4 . . 5][6 . . 7]     buddy(start) = start ^ 2^order

    A pool whose size is no power of two is covered by one root for each bit of the size, the largest first, so that
    roots are aligned as well. The address of a root's buddy lies beyond what is left of the pool: no merge crosses
    roots.

    Args:
        num_blocks: ids run from 0 to `num_blocks - 1`; all start free.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        # Starts of free runs by order; a dict because it keeps insertion order, so that addresses are reproducible.
        self._free: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length())]
        self._orders: dict[int, int] = {}  # order of each run in use, by its start
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._free[order][start] = None
                start += 1 << order

    @property
    def largest_free_run(self) -> int:
        """Blocks in the largest free run; 0 in a full pool."""
        return next((1 << order for order in reversed(range(len(self._free))) if self._free[order]), 0)

    def can_allocate(self, num_blocks: int, count: int = 1) -> bool:
        """Whether `count` runs of `num_blocks` blocks, rounded up to a power of two, are free at once."""
        return self.num_free_in_runs_of(num_blocks) >= count * run_size(num_blocks)

    def num_free_in_runs_of(self, num_blocks: int) -> int:
        """Free blocks in runs of at least `num_blocks`: the others are lost to it, however many they are."""
        order = _order_for(num_blocks)
        return sum(len(self._free[k]) << k for k in range(order, len(self._free)))

    def allocate(self, num_blocks: int) -> int:
        """Take the smallest free run that holds `num_blocks`, split down to a power of two.

        Returns:
            The run's first block. The caller has checked `can_allocate`.
        """
        wanted = _order_for(num_blocks)
        order = next((k for k in range(wanted, len(self._free)) if self._free[k]), None)
        assert order is not None, f"no free run of {num_blocks} blocks"
        start, _ = self._free[order].popitem()
        while order > wanted:
            order -= 1
            self._free[order][start + (1 << order)] = None
        self._orders[start] = order
        self.num_free -= 1 << order
        return start

    def free(self, start: int) -> None:
        """Give back the run that starts at block `start`, and merge it with its buddy as often as that is free."""
        order = self._orders.pop(start, None)
        assert order is not None, f"no run in use starts at block {start}"
        self.num_free += 1 << order
        while order + 1 < len(self._free) and (buddy := start ^ 1 << order) in self._free[order]:
            del self._free[order][buddy]
            start = min(start, buddy)
            order += 1
        self._free[order][start] = None

    def runs(self) -> list[tuple[int, int]]:
        """(start, blocks) of each run in use, by address."""
        return [(start, 1 << order) for start, order in sorted(self._orders.items())]

    def free_runs(self) -> list[tuple[int, int]]:
        """(start, blocks) of each free run, by address."""
        return sorted((start, 1 << order) for order, starts in enumerate(self._free) for start in starts)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the runs cover the pool exactly once, aligned, and all buddies are merged."""
        end = 0
        for start, size in sorted([*self.runs(), *self.free_runs()]):
            assert start == end, "runs overlap or leave a gap"
            assert start % size == 0, "a run is not aligned to its size"
            end += size
        assert end == self.num_blocks
        assert self.num_free == sum(size for _, size in self.free_runs())
        for order, starts in enumerate(self._free):
            assert all(start ^ 1 << order not in starts for start in starts), "two free buddies were not merged"


def run_size(num_blocks: int) -> int:
    """Blocks of the run that `num_blocks` take: the next power of two."""
    return 1 << _order_for(num_blocks)


def _order_for(num_blocks: int) -> int:
    assert num_blocks > 0
    return (num_blocks - 1).bit_length()
