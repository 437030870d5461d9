"""One authenticated connection: frames in, frames out, both bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, cast

from app.transport.errors import FrameError, HandshakeError, SilenceError, SlowReaderError, TransportError
from app.transport.frames import MAX_FRAME_BYTES, Frame, FrameDecoder
from app.transport.handshake import MAX_HANDSHAKE_BYTES, ClientHandshake, ServerHandshake, reject_frame


class Limits(NamedTuple):
    """Bounds of one connection.

    Attributes:
        handshake_s: seconds from the connection to its WELCOME.
        heartbeat_s: seconds between heartbeats, and between looks at whether the other side still talks.
        silent_heartbeats: looks in a row that find nothing received before the connection is given up.
        max_outgoing_bytes: unsent bytes at which the other side counts as a slow reader.
        max_blocked_s: seconds that the other side may let the socket stay full.
        max_frame_bytes: longest frame accepted.
    """

    handshake_s: float = 5.0
    heartbeat_s: float = 1.0
    silent_heartbeats: int = 5
    max_outgoing_bytes: int = 32 << 20
    max_blocked_s: float = 10.0
    max_frame_bytes: int = MAX_FRAME_BYTES


class FrameConnection(asyncio.Protocol):
    """Runs the handshake, then hands every frame to `on_frame`. All calls on the loop's thread.

    Args:
        on_ready: the handshake is through.
        on_frame: one frame; a TransportError that it raises closes the connection.
        on_closed: called once, with the cause: a TransportError of ours, an OSError, or None for a clean end.
        beat: bytes to send each heartbeat interval, or empty.
    """

    def __init__(
        self,
        handshake: ServerHandshake | ClientHandshake,
        limits: Limits,
        *,
        on_ready: Callable[[FrameConnection], None],
        on_frame: Callable[[FrameConnection, Frame], None],
        on_closed: Callable[[FrameConnection, Exception | None], None],
        beat: bytes = b"",
    ) -> None:
        self.closed = False
        self._handshake = handshake
        self._limits = limits
        self._on_ready = on_ready
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._beat = beat
        self._decoder = FrameDecoder(min(MAX_HANDSHAKE_BYTES, limits.max_frame_bytes))
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._error: Exception | None = None
        self._silence = 0
        self._blocked: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ready(self) -> bool:
        """The handshake is through and the connection is open."""
        return self._handshake.version is not None and not self.closed

    def send(self, data: bytes) -> None:
        """Send one or more whole frames, in one write. A connection that is closing drops them."""
        if self.closed or self._transport is None:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > self._limits.max_outgoing_bytes:
            self.fail(SlowReaderError(f"over {self._limits.max_outgoing_bytes} bytes wait to be read"))

    def close(self) -> None:
        """Close after what has been written is sent."""
        if self._transport is not None:
            self._transport.close()

    def fail(self, error: Exception) -> None:
        """Drop the connection at once, unsent bytes included; `on_closed` gets `error`."""
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports, which Ray's processes bring, have the methods but not the base class.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=64 << 10)
        self._timer = self._loop.call_later(
            self._limits.handshake_s,
            lambda: self.fail(HandshakeError(f"no handshake within {self._limits.handshake_s:g} s")),
        )
        self.send(self._handshake.opening())

    def data_received(self, data: bytes) -> None:
        self._silence = 0
        try:
            for frame in self._decoder.feed(data):
                if self.closed or self._error is not None:
                    return
                if self._handshake.version is None:
                    self._shake(frame)
                else:
                    self._on_frame(self, frame)
        except TransportError as error:
            self.fail(error)

    def _shake(self, frame: Frame) -> None:
        try:
            reply = self._handshake.feed(frame)
        except HandshakeError as error:
            if isinstance(self._handshake, ServerHandshake) and self._transport is not None:
                # Told before the door shuts, or the other side's log cannot say why.
                self._error = error
                self._transport.write(reject_frame(error))
                self._transport.close()
                return
            raise
        if reply:
            self.send(reply)
        if self._handshake.version is not None:
            self._decoder.max_bytes = self._limits.max_frame_bytes
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_later(self._limits.heartbeat_s, self._tick)
            self._on_ready(self)

    def _tick(self) -> None:
        # Counts looks rather than seconds: a loop that was itself held up must not blame the other side.
        self._silence += 1
        if self._silence > self._limits.silent_heartbeats:
            seconds = self._limits.heartbeat_s * self._limits.silent_heartbeats
            self.fail(SilenceError(f"nothing received for {seconds:g} s"))
            return
        if self._beat:
            self.send(self._beat)
        self._timer = self._loop.call_later(self._limits.heartbeat_s, self._tick)

    def pause_writing(self) -> None:
        self._blocked = self._loop.call_later(
            self._limits.max_blocked_s,
            lambda: self.fail(SlowReaderError(f"the socket stayed full for {self._limits.max_blocked_s:g} s")),
        )

    def resume_writing(self) -> None:
        if self._blocked is not None:
            self._blocked.cancel()
            self._blocked = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        for timer in (self._timer, self._blocked):
            if timer is not None:
                timer.cancel()
        if self._error is None and exc is None and self._handshake.version is None:
            self._error = FrameError("the connection ended during the handshake")
        self._on_closed(self, self._error or exc)
