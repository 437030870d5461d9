"""A sequence's logical blocks mapped to physical ones (§4.2)."""

from __future__ import annotations

from collections.abc import Iterable

from engine.int32_buffer import Int32Array, Int32Buffer


class BlockTable(Int32Buffer):
    """Physical block ids of one sequence in logical order. Only the KV cache manager changes it.

    The last block may be partly filled; how far is the sequence's `num_computed_tokens`, not kept here.

    Attributes:
        num_hashed_blocks: leading blocks already offered to the prefix cache.
    """

    __slots__ = ("num_hashed_blocks",)

    def __init__(self, blocks: Iterable[int] | Int32Array = (), num_hashed_blocks: int = 0) -> None:
        super().__init__(blocks)
        self.num_hashed_blocks = num_hashed_blocks

    @property
    def blocks(self) -> Int32Array:
        """int32 `[len]`; a view, valid until the table changes."""
        return self.view

    def fork(self) -> BlockTable:
        return BlockTable(self.view, self.num_hashed_blocks)
