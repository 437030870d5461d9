"""What the prefix cache has gained and lost since somebody last asked: how replicas tell ingresses what they hold."""

from __future__ import annotations

from typing import NamedTuple


class BlockChanges(NamedTuple):
    """Net changes: a block that came and went in between is in `removed`, whether it was known before or not."""

    stored: list[bytes]
    removed: list[bytes]


class BlockEvents:
    """Gathers a step's changes. Whoever wants them takes them after each step, or they grow."""

    def __init__(self) -> None:
        self._held: dict[bytes, bool] = {}

    def stored(self, block_hash: bytes) -> None:
        self._held[block_hash] = True

    def removed(self, block_hash: bytes) -> None:
        self._held[block_hash] = False

    def take(self) -> BlockChanges | None:
        """The changes since the last call, or None if there are none."""
        if not self._held:
            return None
        held, self._held = self._held, {}
        return BlockChanges(
            [block_hash for block_hash, is_held in held.items() if is_held],
            [block_hash for block_hash, is_held in held.items() if not is_held],
        )
