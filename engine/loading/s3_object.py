"""One version of an object in the node's cache: a file of its size, filled as its bytes are asked for.

    objects/ID         the bytes; those that have not come are holes
    objects/ID.state   64 bytes of header, then a byte for each block: 1 once its bytes are there
    objects/ID.lock    held by the process that fetches

A block is marked after it was written, so a killed process loses at most the blocks that were under way. Power that
fails may lose written pages: the header names the boot that fetches into the file until its pages are on the disk, and
blocks of another boot count as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.loading.node_cache import open_cached
from engine.loading.s3_client import S3Object

BLOCK_BYTES = 1 << 16

_HEADER_BYTES = 64
_VERIFIED = 0  # offset of the byte that says that the whole was compared with S3's checksum
_BOOT = slice(8, 44)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class CachedObject:
    """Which bytes of an object this node has. In use, so not evicted, as long as this lives.

    Args:
        place: endpoint and bucket: equal keys elsewhere are other objects.
    """

    def __init__(self, folder: Path, place: str, item: S3Object) -> None:
        self.item = item
        identity = "\0".join([place, item.key, item.etag, str(item.size)])
        self.path = folder / hashlib.sha256(identity.encode()).hexdigest()[:32]
        folder.mkdir(parents=True, exist_ok=True)
        self.file = open_cached(self.path, create=True)
        self._num_blocks = -(-item.size // BLOCK_BYTES)
        self._state = self._open_state()

    @property
    def lock_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.lock")

    @property
    def is_whole(self) -> bool:
        return self._state.find(b"\0", _HEADER_BYTES) < 0

    @property
    def is_verified(self) -> bool:
        return self._state[_VERIFIED] == 1

    def set_verified(self) -> None:
        self._state[_VERIFIED] = 1
        self._state.flush()

    def missing(self, ranges: Sequence[range] | None) -> list[range]:
        """Blocks of these bytes that are not there, as ranges of bytes; None is all bytes."""
        wanted = [range(self.item.size)] if ranges is None else ranges
        runs: list[range] = []
        for blocks in _blocks(wanted):
            index, stop = blocks.start, blocks.stop
            while (index := self._state.find(b"\0", _HEADER_BYTES + index, _HEADER_BYTES + stop) - _HEADER_BYTES) >= 0:
                end = self._state.find(b"\1", _HEADER_BYTES + index, _HEADER_BYTES + stop) - _HEADER_BYTES
                end = stop if end < 0 else end
                runs.append(range(index * BLOCK_BYTES, min(end * BLOCK_BYTES, self.item.size)))
                index = end
        return runs

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at their place. They count once `mark` has been told."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self.file.fd, view, offset)
            offset, view = offset + written, view[written:]

    def mark(self, done: range) -> None:
        """These bytes were written, from the start of a block: its whole blocks count from now on."""
        first = done.start // BLOCK_BYTES
        last = self._num_blocks if done.stop == self.item.size else done.stop // BLOCK_BYTES
        if last > first:
            self._state[_HEADER_BYTES + first : _HEADER_BYTES + last] = b"\1" * (last - first)

    def begin(self) -> None:
        """Bytes are about to come in, whose pages the disk may not have for a while."""
        self._state[_BOOT] = _boot_id()
        self._state.flush()

    def settle(self) -> None:
        """Wait until the disk has all that came."""
        os.fsync(self.file.fd)
        self._state.flush()
        self._state[_BOOT] = bytes(36)
        self._state.flush()

    def forget(self) -> None:
        """What was read is wrong: nothing counts as there."""
        self._state[_HEADER_BYTES:] = bytes(len(self._state) - _HEADER_BYTES)
        self._state[_VERIFIED] = 0
        self._state.flush()

    def _open_state(self) -> mmap.mmap:
        fd = os.open(self.path.with_name(f"{self.path.name}.state"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # not `lock_path`, which is held for as long as a download takes
            if os.fstat(self.file.fd).st_size != self.item.size:
                os.ftruncate(self.file.fd, self.item.size)
            size = _HEADER_BYTES + self._num_blocks
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
            state = mmap.mmap(fd, size)
            if state[_BOOT] not in (bytes(36), _boot_id()):
                state[:] = bytes(size)
            return state
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own, which would keep the lock
            os.close(fd)


def _blocks(ranges: Iterable[range]) -> list[range]:
    """The blocks that hold these bytes, in order, those that touch joined."""
    spans = sorted((part.start // BLOCK_BYTES, -(-part.stop // BLOCK_BYTES)) for part in ranges if part)
    joined: list[range] = []
    for start, stop in spans:
        if joined and start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(stop, joined[-1].stop))
        else:
            joined.append(range(start, stop))
    return joined


def _boot_id() -> bytes:
    return _BOOT_ID.read_bytes().strip()[:36].ljust(36, b"\0")
