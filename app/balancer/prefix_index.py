"""Which replica holds which prefix, exactly: chained block hashes to the replicas that hold those blocks.

Because a block's hash covers all tokens before it, membership is enough and no tree is needed. A replica drops the end
of a chain before its beginning, so whoever holds a block holds the blocks before it, and a chain can be searched by
halves. Should a replica break that rule, its overlap is overstated: a worse choice, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

# Runs of set bits are read this many at a time.
_WORD = 64
_WORD_MASK = (1 << _WORD) - 1


class Overlap(NamedTuple):
    """Replicas that hold exactly the leading `num_blocks` of a chain, as a bitmap of slots."""

    num_blocks: int
    holders: int


class PrefixIndex:
    """Bitmaps of slots by block hash. A slot is a small number that stands for a replica.

    Most blocks lie on one replica; its bitmap is then one object shared by all of that replica's blocks.
    """

    def __init__(self) -> None:
        self._holders: dict[Hashable, int] = {}
        self._held: dict[int, set[Hashable]] = {}
        self._bits: list[int] = []

    def __len__(self) -> int:
        return len(self._holders)

    def bit(self, slot: int) -> int:
        """The bitmap of one slot."""
        while slot >= len(self._bits):
            self._bits.append(1 << len(self._bits))
        return self._bits[slot]

    def held(self, slot: int) -> set[Hashable]:
        """The hashes of a slot, the index's own set."""
        return self._held.setdefault(slot, set())

    def holders(self, block_hash: Hashable) -> int:
        """The bitmap of the slots that hold a block."""
        return self._holders.get(block_hash, 0)

    def store(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks now; some it may have held before."""
        bit, held, holders = self.bit(slot), self.held(slot), self._holders
        for block_hash in hashes:
            before = holders.get(block_hash)
            holders[block_hash] = bit if before is None else before | bit
            held.add(block_hash)

    def remove(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks no more; those it did not hold are no error."""
        bit, held, holders = self.bit(slot), self.held(slot), self._holders
        for block_hash in hashes:
            if block_hash in held:
                held.remove(block_hash)
                left = holders[block_hash] & ~bit
                if left:
                    holders[block_hash] = left if left & (left - 1) else self.bit(left.bit_length() - 1)
                else:
                    del holders[block_hash]

    def replace(self, slot: int, hashes: Iterable[Hashable]) -> None:
        """The replica holds these blocks and no others."""
        wanted = set(hashes)
        self.remove(slot, self.held(slot) - wanted)
        self.store(slot, wanted)

    def drop(self, slot: int) -> None:
        """Forget a replica."""
        self.remove(slot, tuple(self.held(slot)))
        del self._held[slot]

    def overlaps(self, chain: Sequence[Hashable], among: int, also: PrefixIndex | None = None) -> list[Overlap]:
        """How much of a chain each slot of `among` holds: the longest first, slots without any of it left out.

        Args:
            also: an index whose entries count too: of blocks that are on their way.
        """
        if not chain:
            return []
        first = self._at(chain[0], among, also)
        if not first:
            return []
        last = self._at(chain[-1], first, also)
        found = [Overlap(len(chain), last)] if last else []
        self._search(chain, 0, first, len(chain) - 1, last, also, found)
        return found

    def _search(
        self,
        chain: Sequence[Hashable],
        low: int,
        at_low: int,
        high: int,
        at_high: int,
        also: PrefixIndex | None,
        found: list[Overlap],
    ) -> None:
        """Append those who hold block `low` but not block `high`, deepest first; holders only dwindle in between."""
        if at_low == at_high:
            return
        if high - low == 1:
            found.append(Overlap(low + 1, at_low & ~at_high))
            return
        middle = (low + high) // 2
        at_middle = self._at(chain[middle], at_low, also)
        self._search(chain, middle, at_middle, high, at_high, also, found)
        self._search(chain, low, at_low, middle, at_middle, also, found)

    def _at(self, block_hash: Hashable, among: int, also: PrefixIndex | None) -> int:
        holders = self._holders.get(block_hash, 0)
        if also is not None:
            holders |= also._holders.get(block_hash, 0)
        return holders & among


def slots_of(bitmap: int) -> list[int]:
    """The slots of a bitmap, ascending."""
    slots = []
    base = 0
    while bitmap:
        word = bitmap & _WORD_MASK
        while word:
            low = word & -word
            slots.append(base + low.bit_length() - 1)
            word ^= low
        bitmap >>= _WORD
        base += _WORD
    return slots
