"""Frames: how messages lie on the wire.

    ┌────────────┬───────────────────────────────────┐
    │ length u32 │ msgpack array [kind, field, ...]  │   length: bytes of the array, little-endian
    └────────────┴───────────────────────────────────┘

Data only: msgpack carries numbers, strings, bytes, arrays and maps, never objects or code. A kind that a side does
not know, and fields after those it knows, are ignored, so that neighbouring versions can talk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from app.transport.errors import FrameError

MAX_FRAME_BYTES = 16 << 20

_LENGTH = struct.Struct("<I")


class Frame(NamedTuple):
    """One message: its kind and its fields, not yet interpreted."""

    kind: int
    fields: tuple[Any, ...]


def encode_frame(kind: int, *fields: Any) -> bytes:
    """The bytes of one frame. Raises FrameError if it exceeds MAX_FRAME_BYTES."""
    body: bytes = msgpack.packb((kind, *fields), use_bin_type=True)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"frame of kind {kind} has {len(body)} bytes, more than the allowed {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into frames. `max_bytes` may change between frames: it is small until a peer is trusted."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield every frame that `data` completes. Raises FrameError; the stream cannot be resumed after one."""
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, position)
                if length > self.max_bytes:
                    raise FrameError(f"frame of {length} bytes exceeds the allowed {self.max_bytes}")
                start, end = position + _LENGTH.size, position + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start:end])
                position = end
                yield _parse(body)
        finally:
            del self._buffer[:position]


def _parse(body: bytes) -> Frame:
    try:
        values = msgpack.unpackb(body, raw=False, use_list=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameError(f"frame is not msgpack: {error or type(error).__name__}") from error
    if not isinstance(values, tuple) or not values or type(values[0]) is not int:
        raise FrameError("frame is not an array that begins with its kind")
    return Frame(values[0], values[1:])
