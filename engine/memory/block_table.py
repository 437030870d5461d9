"""A sequence's logical blocks mapped to physical ones (§4.2)."""

from __future__ import annotations

from engine.int32_buffer import Int32Array, Int32Buffer


class BlockTable:
    """Physical block ids of one sequence in logical order. Only the KV cache manager changes it.

    The last block may be partly filled; how far is the sequence's `num_computed_tokens`, not kept here.
    """

    __slots__ = ("_blocks", "num_hashed_blocks")

    def __init__(self, blocks: Int32Buffer | None = None, num_hashed_blocks: int = 0) -> None:
        self._blocks = blocks or Int32Buffer()
        # Leading blocks already offered to the prefix cache.
        self.num_hashed_blocks = num_hashed_blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> int:
        return self._blocks[index]

    @property
    def blocks(self) -> Int32Array:
        """int32 `[len]`; a view, valid until the table changes."""
        return self._blocks.view

    def append(self, block: int) -> None:
        self._blocks.append(block)

    def replace(self, index: int, block: int) -> None:
        """Point a logical block elsewhere: copy-on-write (§4.4)."""
        self._blocks[index] = block

    def fork(self) -> BlockTable:
        return BlockTable(self._blocks.copy(), self.num_hashed_blocks)
