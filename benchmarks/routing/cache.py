"""A simulated replica's cached blocks: an exact LRU cache."""

from __future__ import annotations

from collections import OrderedDict


class BlockCache:
    """Blocks of which the least recently used are dropped.

    Args:
        num_blocks: no more than so many are kept.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._used_at: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used_at)

    def age_s(self, now: float) -> float:
        """How long the block that goes next has not been used; 0 if there is none."""
        return now - next(iter(self._used_at.values())) if self._used_at else 0.0

    def use(self, chain: list[int], now: float) -> tuple[int, list[int], list[int]]:
        """Use a chain, its end first, so that the end is dropped before the beginning.

        Returns how many leading blocks were there, which blocks are new, and which were dropped for them.
        """
        used_at = self._used_at
        hits = next((index for index, block in enumerate(chain) if block not in used_at), len(chain))
        stored = []
        for block in reversed(chain):
            if block in used_at:
                used_at.move_to_end(block)
            else:
                stored.append(block)
            used_at[block] = now
        removed = [used_at.popitem(last=False)[0] for _ in range(len(used_at) - self._num_blocks)]
        return hits, stored, removed
