"""How a replica tells ingresses which blocks its prefix cache holds.

    BLOCKS    replica → ingress   number, hashes stored, hashes removed, digest after them
    SNAPSHOT  replica → ingress   number, all hashes or a part of them, digest or None if parts follow
    SYNC      ingress → replica   the number up to which it knows all; 0: nothing

Numbers count a replica's BLOCKS from 1. The connection itself is bound to one epoch, the replica's process, so that
numbers of two processes never meet. Hashes travel as one run of HASH_BYTES each.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from app.transport.errors import FrameError
from app.transport.frames import Frame, encode_frame
from app.transport.messages import Kind
from engine.memory.block_hash import HASH_BYTES

# A frame holds 16 MiB; parts of half that leave room for whatever else waits on the connection.
_SNAPSHOT_PART = (8 << 20) // HASH_BYTES


class BlockBatch(NamedTuple):
    """One BLOCKS message."""

    number: int
    stored: list[bytes]
    removed: list[bytes]
    digest: int


class SnapshotPart(NamedTuple):
    """One SNAPSHOT message; `digest` is None in all parts but the last."""

    number: int
    hashes: list[bytes]
    digest: int | None


def digest_of(hashes: Iterable[bytes]) -> int:
    """A set's digest: equal for equal sets whatever the order, kept up by XOR as hashes come and go."""
    digest = 0
    for block_hash in hashes:
        digest ^= int.from_bytes(block_hash[:8], "little")
    return digest


def encode_blocks(batch: BlockBatch) -> bytes:
    """The BLOCKS frame."""
    return encode_frame(Kind.BLOCKS, batch.number, b"".join(batch.stored), b"".join(batch.removed), batch.digest)


def decode_blocks(frame: Frame) -> BlockBatch:
    """Raises FrameError."""
    try:
        number, stored, removed, digest = frame.fields[:4]
        return BlockBatch(_number(number), _hashes(stored), _hashes(removed), int(digest))
    except (ValueError, TypeError) as error:
        raise FrameError(f"malformed BLOCKS: {error}") from error


def encode_snapshot(number: int, hashes: Collection[bytes], digest: int) -> bytes:
    """The SNAPSHOT frames, one after the other."""
    ordered = list(hashes)
    starts = range(0, max(len(ordered), 1), _SNAPSHOT_PART)
    frames = []
    for start in starts:
        last = start + _SNAPSHOT_PART >= len(ordered)
        part = b"".join(ordered[start : start + _SNAPSHOT_PART])
        frames.append(encode_frame(Kind.SNAPSHOT, number, part, digest if last else None))
    return b"".join(frames)


def decode_snapshot(frame: Frame) -> SnapshotPart:
    """Raises FrameError."""
    try:
        number, hashes, digest = frame.fields[:3]
        return SnapshotPart(_number(number), _hashes(hashes), None if digest is None else int(digest))
    except (ValueError, TypeError) as error:
        raise FrameError(f"malformed SNAPSHOT: {error}") from error


def encode_sync(number: int) -> bytes:
    """The SYNC frame."""
    return encode_frame(Kind.SYNC, number)


def decode_sync(frame: Frame) -> int:
    """The number up to which the ingress knows all. Raises FrameError."""
    number = frame.fields[0] if frame.fields else None
    if type(number) is not int or number < 0:
        raise FrameError("malformed SYNC: a number of BLOCKS expected")
    return number


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of BLOCKS")
    return value


def _hashes(value: object) -> list[bytes]:
    if not isinstance(value, bytes) or len(value) % HASH_BYTES:
        raise ValueError(f"hashes are not a run of {HASH_BYTES} bytes each")
    return [value[start : start + HASH_BYTES] for start in range(0, len(value), HASH_BYTES)]
