"""What this replica's prefix cache holds, and the last changes to it, for the ingresses that follow it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from app.transport.block_messages import BlockBatch, digest_of, encode_blocks, encode_snapshot
from engine.memory import BlockChanges

# Batches kept for ingresses that lost their line for a moment; whoever is farther behind gets a snapshot.
_KEPT_BATCHES = 1024
# Weight of a new sample in the mean age of what is dropped.
_WEIGHT = 0.05


class BlockLog:
    """A copy of the prefix cache's hashes, fed by its changes. All on one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._number = 0
        self._digest = 0
        self._stored_at: dict[bytes, float] = {}
        self._batches: deque[BlockBatch] = deque(maxlen=_KEPT_BATCHES)
        self._age_s = 0.0

    def __len__(self) -> int:
        return len(self._stored_at)

    @property
    def cache_age_s(self) -> float:
        """How old blocks are when they are dropped, in the mean; 0 until some have been."""
        return self._age_s

    def add(self, changes: BlockChanges) -> bytes:
        """Take a step's changes in; the frame that tells of them."""
        now = self._clock()
        # What came and went within the step was never told of.
        stored = [item for item in changes.stored if item not in self._stored_at]
        removed = [item for item in changes.removed if item in self._stored_at]
        for item in removed:
            age_s = now - self._stored_at.pop(item)
            self._age_s += (_WEIGHT if self._age_s else 1.0) * (age_s - self._age_s)
        for item in stored:
            self._stored_at[item] = now
        self._digest ^= digest_of(stored) ^ digest_of(removed)
        self._number += 1
        batch = BlockBatch(self._number, stored, removed, self._digest)
        self._batches.append(batch)
        return encode_blocks(batch)

    def since(self, number: int) -> bytes:
        """Frames that bring an ingress up to date which knows all up to `number`: a replay, or else a snapshot."""
        first_kept = self._number - len(self._batches) + 1
        if number == self._number:
            # Nothing new, which the ingress must hear too: the digest proves it.
            return encode_blocks(BlockBatch(number, [], [], self._digest))
        if number and first_kept <= number + 1 <= self._number:
            return b"".join(encode_blocks(batch) for batch in self._batches if batch.number > number)
        return encode_snapshot(self._number, self._stored_at, self._digest)
