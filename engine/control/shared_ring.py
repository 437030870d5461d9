"""Messages from one process to several of its node, through shared memory.

    int32 words  0       published: pieces written so far; readers wait on it
                 16      aborted: no more will come
                 32+16 r taken: pieces that reader r has copied out
                 33+16 r whether it sleeps: only a hint, whom to rouse
    byte 4096    slot 0: length of the piece, bytes of the message still to come after it, the piece
                 slot 1 ...

A piece is a message, or a part of one too long for a slot. The writer fills a slot once every reader has taken what it
held. Numbers are modulo 2^32. Every wait has a deadline. The segment has a name only until its readers have it, so
that nothing is left behind however the processes end.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from engine.control.futex import futex_wait, futex_wake

NUM_SLOTS = 4
SLOT_BYTES = 1 << 18
MAX_READERS = 60

_FOLDER = Path("/dev/shm")
_PREFIX = "quire-steps-"
_PUBLISHED, _ABORTED, _TAKEN, _LINE = 0, 16, 32, 16
_SLOTS_AT = 4096
_SLOT_HEADER = 8
_MASK = 0xFFFFFFFF

# A reader looks for so long, then for so long with its core offered to others in between, before it sleeps: to wake a
# sleeper takes longer than all the rest, and what rank 0 does between two steps of a busy engine is over by then.
_SPIN_S = 30e-6
_YIELD_S = 2e-3
# How often a sleeper looks whether it is still wanted, and a writer whether there is room.
_SLICE_S = 0.5
_POLL_S = 100e-6


class RingError(Exception):
    """The ring was aborted, or nothing moved before the deadline."""


class SharedRing:
    """The memory, as either side maps it."""

    def __init__(self, fd: int) -> None:
        try:
            self._map = mmap.mmap(fd, _SLOTS_AT + NUM_SLOTS * (SLOT_BYTES + _SLOT_HEADER))
        finally:
            os.close(fd)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("I")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    @property
    def aborted(self) -> bool:
        """Whether either side has given up."""
        return self._words[_ABORTED] != 0

    def abort(self) -> None:
        """Let everyone who waits return at once, with a RingError."""
        self._words[_ABORTED] = 1
        futex_wake(self._base)

    def _slot(self, number: int) -> int:
        return _SLOTS_AT + number % NUM_SLOTS * (SLOT_BYTES + _SLOT_HEADER)


class RingWriter(SharedRing):
    """The one that writes; it makes the segment.

    Args:
        num_readers: how many there will be; each has a number from 0.
    """

    def __init__(self, num_readers: int) -> None:
        assert 0 < num_readers <= MAX_READERS
        self._num_readers = num_readers
        self.name = _PREFIX + secrets.token_hex(8)
        fd = os.open(_FOLDER / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, _SLOTS_AT + NUM_SLOTS * (SLOT_BYTES + _SLOT_HEADER))
        super().__init__(fd)

    def unlink(self) -> None:
        """Take the name away, once all readers have the memory. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            (_FOLDER / self.name).unlink()

    def rouse(self) -> None:
        """A message comes soon: let readers that sleep wake up while it is made."""
        words = self._words
        if any(words[_TAKEN + _LINE * reader + 1] for reader in range(self._num_readers)):
            futex_wake(self._base)

    def publish(self, message: bytes, deadline_s: float) -> None:
        """Write a message for all readers and wake them.

        Raises:
            RingError: aborted, or a reader has not made room within `deadline_s` seconds; it says which.
        """
        view = memoryview(message)
        begin = 0
        while True:
            piece = view[begin : begin + SLOT_BYTES]
            begin += len(piece)
            self._publish_piece(piece, len(view) - begin, deadline_s)
            if begin == len(view):
                return

    def _publish_piece(self, piece: memoryview, left: int, deadline_s: float) -> None:
        published = self._words[_PUBLISHED]
        for reader in range(self._num_readers):
            self._wait_for_room(reader, published, deadline_s)
        at = self._slot(published)
        self._words[at // 4], self._words[at // 4 + 1] = len(piece), left
        self._bytes[at + _SLOT_HEADER : at + _SLOT_HEADER + len(piece)] = piece
        self._words[_PUBLISHED] = published + 1 & _MASK
        futex_wake(self._base)

    def _wait_for_room(self, reader: int, published: int, deadline_s: float) -> None:
        deadline = 0.0
        while (published - self._words[_TAKEN + _LINE * reader] & _MASK) >= NUM_SLOTS:
            now = time.monotonic()
            deadline = deadline or now + deadline_s
            if self.aborted:
                raise RingError("aborted")
            if now > deadline:
                raise RingError(f"reader {reader} has taken nothing for {deadline_s:g} s")
            time.sleep(_POLL_S)


class RingReader(SharedRing):
    """One of those who read.

    Args:
        name: of the segment; FileNotFoundError if this machine has no such.
        reader: its number, which no other has.
    """

    def __init__(self, name: str, reader: int) -> None:
        if not name.startswith(_PREFIX) or not name.removeprefix(_PREFIX).isalnum():
            raise ValueError(f"{name!r} names no ring")
        super().__init__(os.open(_FOLDER / name, os.O_RDWR | os.O_CLOEXEC))
        self._taken_at = _TAKEN + _LINE * reader

    def take(self, still_wanted: Callable[[], bool] = lambda: True) -> bytes | None:
        """The next message; waits for it as long as `still_wanted` says, then gives None.

        Raises:
            RingError: aborted.
        """
        pieces = []
        while True:
            if not self._wait(still_wanted):
                return None
            taken = self._words[self._taken_at]
            at = self._slot(taken)
            length, left = self._words[at // 4], self._words[at // 4 + 1]
            pieces.append(bytes(self._bytes[at + _SLOT_HEADER : at + _SLOT_HEADER + length]))
            self._words[self._taken_at] = taken + 1 & _MASK
            if not left:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wait(self, still_wanted: Callable[[], bool]) -> bool:
        """True once there is a piece."""
        words, taken = self._words, self._words[self._taken_at]
        began = time.perf_counter()
        while words[_PUBLISHED] == taken:
            waited_s = time.perf_counter() - began
            if waited_s < _SPIN_S:
                continue
            if self.aborted:
                raise RingError("aborted")
            if waited_s < _YIELD_S:
                os.sched_yield()
                continue
            if not still_wanted():
                return False
            words[self._taken_at + 1] = 1
            was_woken = futex_wait(self._base, taken, _SLICE_S)
            words[self._taken_at + 1] = 0
            if was_woken:
                began = time.perf_counter()  # there is a piece, or the writer has said that one comes
        return True
