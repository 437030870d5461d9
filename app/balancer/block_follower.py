"""Follows one replica's prefix cache: applies its changes in order, asks again for what it missed."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from typing import Protocol

from app.transport.block_messages import BlockBatch, SnapshotPart, digest_of

logger = logging.getLogger(__name__)


class BlockListener(Protocol):
    """Who is told: the balancer."""

    def blocks_changed(self, replica_id: str, stored: Iterable[Hashable], removed: Iterable[Hashable]) -> None:
        """What a replica has cached since, and what it has dropped."""
        ...

    def blocks_replaced(self, replica_id: str, hashes: Iterable[Hashable]) -> None:
        """All that a replica has cached."""
        ...


class BlockFollower:
    """Keeps its own copy of the replica's hashes, so that a line lost for a moment costs a replay, not a snapshot.

    Every message brings the digest of all that the replica holds. One that does not match what is known here proves
    the copy wrong; until a snapshot has mended it, the replica counts as holding nothing.

    Args:
        listener: told of the changes, in the order in which they were made.
    """

    def __init__(self, replica_id: str, listener: BlockListener) -> None:
        self._replica_id = replica_id
        self._listener = listener
        self._hashes: set[bytes] = set()
        self._digest = 0
        self._number = 0
        self._in_step = False
        self._parts: list[bytes] = []

    @property
    def in_step(self) -> bool:
        """Whether the copy is the replica's own set, as of its last message."""
        return self._in_step

    def connected(self) -> int:
        """The line is up, again or for the first time: the number from which to ask for changes."""
        self._in_step = False
        self._parts = []
        return self._number

    def changed(self, batch: BlockBatch) -> int | None:
        """A BLOCKS message. Returns the number to ask from if something is missing, else None."""
        if batch.number < self._number or (batch.number == self._number and self._in_step):
            return None
        if batch.number > self._number + 1:
            # Asked for already, and on its way, unless this is the first that shows the gap.
            return self._lose("a message is missing", ask_from=self._number) if self._in_step else None
        self._number = batch.number
        self._hashes.difference_update(batch.removed)
        self._hashes.update(batch.stored)
        self._digest ^= digest_of(batch.stored) ^ digest_of(batch.removed)
        if self._digest != batch.digest:
            self._number = 0
            return self._lose("the digests differ", ask_from=0)
        if self._in_step:
            self._listener.blocks_changed(self._replica_id, batch.stored, batch.removed)
        else:
            self._tell_all()
        return None

    def replaced(self, part: SnapshotPart) -> int | None:
        """A SNAPSHOT message. Returns the number to ask from if it is damaged, else None."""
        self._parts += part.hashes
        if part.digest is None:
            return None
        self._hashes, self._parts = set(self._parts), []
        self._digest = digest_of(self._hashes)
        if self._digest != part.digest:
            self._number = 0
            return self._lose("a snapshot's digest differs", ask_from=0)
        self._number = part.number
        self._tell_all()
        return None

    def _tell_all(self) -> None:
        self._in_step = True
        self._listener.blocks_replaced(self._replica_id, self._hashes)

    def _lose(self, why: str, ask_from: int) -> int:
        logger.warning("The prefix index of replica %s is out of step: %s", self._replica_id, why)
        self._in_step = False
        self._listener.blocks_replaced(self._replica_id, ())
        return ask_from
