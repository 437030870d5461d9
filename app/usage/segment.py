"""Segments: files that one writer each appends records to, locked while it does.

A writer's segments are `WRITER-000001.jsonl`, `WRITER-000002.jsonl` ... A segment comes into being with its first lines
in it, by a rename. Requests that are open when a segment is closed are among the first lines of the next: whether there
is a next one is what says whether a segment's open requests go on or have been cut off (`close_abandoned`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from app.usage.records import DamagedLineError, Line, SegmentEnd, SegmentStart, decode_line, encode_line

SUFFIX = ".jsonl"
MAKING_SUFFIX = ".making"

_NAME = re.compile(r"(.+)-(\d{6,})")


def segment_name(writer: str, number: int) -> str:
    """What a writer's segment is called, without the suffix."""
    return f"{writer}-{number:06d}"


def split_name(name: str) -> tuple[str, int]:
    """A segment's writer and number."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no segment's name")
    return match[1], int(match[2])


def next_segment(name: str) -> str:
    """What the same writer's next segment is called."""
    writer, number = split_name(name)
    return segment_name(writer, number + 1)


def sync_folder(folder: Path) -> None:
    """Have renames in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SegmentFile:
    """A segment that is being written, by this process alone.

    Args:
        first_lines: in it when it appears.

    Raises:
        OSError: it cannot be made, or another process has made it.
    """

    def __init__(self, folder: Path, name: str, at: float, first_lines: Iterable[bytes] = ()) -> None:
        self.path = folder / (name + SUFFIX)
        self.began = at
        making = folder / (name + MAKING_SUFFIX)
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            raise FileExistsError(errno.EEXIST, "another process has made it", str(self.path))
        self._descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.size = 0
            carried = b"".join(first_lines)
            self.append(encode_line(SegmentStart(at)) + carried)
            self.sync()
            making.rename(self.path)
            making = self.path
            sync_folder(folder)
        except BaseException:
            # Its requests go on in the segment before it: it must not stay.
            with contextlib.suppress(OSError):
                making.unlink(missing_ok=True)
            os.close(self._descriptor)
            raise
        self.is_empty = not carried

    def append(self, data: bytes) -> None:
        """Write whole lines; a failure leaves none of them, OSError says why."""
        if not data:
            return
        view = memoryview(data)
        try:
            # What a write that failed has left is no part of it, nor what could not be taken back at once.
            if os.fstat(self._descriptor).st_size > self.size:
                os.ftruncate(self._descriptor, self.size)
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(data)
        self.is_empty = False

    def sync(self) -> None:
        """Have what was written survive a power failure."""
        os.fdatasync(self._descriptor)

    def is_lost(self) -> bool:
        """Whether its file is no longer there: it was removed, or its directory was."""
        try:
            found, own = self.path.stat(), os.fstat(self._descriptor)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                return True
            raise
        return (found.st_dev, found.st_ino) != (own.st_dev, own.st_ino)

    def close(self, *, carried: bool) -> None:
        """Say that no more will come, and give up the lock; one without records is removed.

        Args:
            carried: the next segment is there and has the requests that are open.
        """
        try:
            if self.is_empty:
                self.path.unlink(missing_ok=True)
            else:
                self.append(encode_line(SegmentEnd(carried)))
                self.sync()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give up the lock and nothing else, as the end of the process would."""
        os.close(self._descriptor)


def close_abandoned(path: Path, has_next: Callable[[], bool]) -> bool:
    """Close a segment whose writer has ended without doing so.

    Args:
        has_next: whether its writer has begun another; asked once nobody has the lock, when none can come any more.

    Returns:
        Whether it is closed now; False if somebody writes it.
    """
    with path.open("r+b") as file:
        if not try_lock(file.fileno(), fcntl.LOCK_EX):
            return False
        if not _is_closed(path):
            file.seek(0, os.SEEK_END)
            torn = file.tell() > 0
            if torn:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            # A line that was torn stays: it is damaged, and counted as such.
            file.write((b"\n" if torn else b"") + encode_line(SegmentEnd(carried=has_next())))
            file.flush()
            os.fsync(file.fileno())
    return True


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock a file (LOCK_EX or LOCK_SH) if nobody else's lock is in the way."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_being_written(path: Path) -> bool:
    """Whether a process has it locked."""
    with path.open("rb") as file:
        return not try_lock(file.fileno(), fcntl.LOCK_SH)


def decode_lines(lines: Iterable[bytes]) -> Iterator[Line | None]:
    """The lines of a segment; None for each that is damaged."""
    for line in lines:
        try:
            yield decode_line(line)
        except DamagedLineError:
            yield None


def _is_closed(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        last = file.readlines()[-1:]
    return bool(last) and isinstance(next(decode_lines(last)), SegmentEnd)
