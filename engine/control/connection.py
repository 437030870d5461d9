"""The socket between rank 0 and another rank: frames of a kind and a body, both ends proven to know the group's secret.

    int32 length of the body, byte kind, body

It carries what comes before the steps, signs of life, failures, and on other nodes the steps. Nothing read from it is
unpickled: bodies are JSON, text or a step's bytes. A process that dies, however it dies, closes it.
"""

from __future__ import annotations

import contextlib
import enum
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from typing import Any, NamedTuple

_HEADER = struct.Struct("<iB")
_MAX_BODY = 1 << 28
_NONCE_BYTES = 32
_DIGEST = "sha256"


class ControlError(Exception):
    """The other end has gone, is late, or is none of this group."""


class Kind(enum.IntEnum):
    """What a frame says."""

    HELLO = 1  # rank → driver: which rank this is
    SETUP = 2  # driver → rank: the model and the options
    LOADED = 3  # rank → driver: the weights are there, and so many blocks would fit beside them
    CACHE = 4  # driver → rank: the KV pool to build
    READY = 5  # rank → driver: steps may come
    STEP = 6  # driver → rank, where memory cannot be shared: a step's number and bytes
    BEAT = 7  # rank → driver: alive, and how many steps are done
    FAILED = 8  # rank → driver: why this rank ends
    STOP = 9  # driver → rank: end
    ADAPTER = 10  # driver → rank: an adapter to prepare beside the steps, before one loads it
    ADAPTER_READY = 11  # rank → driver: it is prepared, or why it cannot be


class Frame(NamedTuple):
    """One frame."""

    kind: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """The body of a frame before the steps; ControlError if it is no mapping."""
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ControlError(f"a frame of kind {self.kind} is no JSON object")
        return found


class Connection:
    """A connected, authenticated socket. One thread receives; any may send."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        # One socket seen twice, as Python keeps the timeout with the object: sending must not change how long the
        # receiving thread waits.
        self._incoming = sock.dup()
        self._send_lock = threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, kind: Kind, body: bytes = b"", timeout_s: float = 10.0) -> None:
        """Raises ControlError if the other end has gone or reads nothing for `timeout_s` seconds."""
        with self._send_lock:
            try:
                self._socket.settimeout(timeout_s)
                self._socket.sendall(_HEADER.pack(len(body), kind) + body)
            except OSError as error:
                raise ControlError(f"nothing can be sent ({error})") from None

    def send_json(self, kind: Kind, **fields: Any) -> None:
        """As `send`."""
        self.send(kind, json.dumps(fields).encode())

    def receive(self, timeout_s: float) -> Frame | None:
        """The next frame; None if none has begun within `timeout_s` seconds.

        Raises:
            ControlError: the other end has gone, or stops amid a frame.
        """
        header = self._read(_HEADER.size, timeout_s, or_none=True)
        if header is None:
            return None
        length, kind = _HEADER.unpack(header)
        if not 0 <= length <= _MAX_BODY:
            raise ControlError(f"a frame of {length} bytes")
        body = self._read(length, 30.0)
        assert body is not None
        return Frame(kind, body)

    def expect(self, kind: Kind, timeout_s: float) -> Frame:
        """A frame of this kind, within `timeout_s` seconds; ControlError otherwise. BEATs are passed over."""
        deadline = time.monotonic() + timeout_s
        while True:
            frame = self.receive(max(0.0, deadline - time.monotonic()))
            if frame is None:
                raise ControlError(f"no {kind.name} within {timeout_s:g} s")
            if frame.kind == Kind.FAILED:
                raise ControlError(frame.body.decode(errors="replace"))
            if frame.kind == kind:
                return frame
            if frame.kind != Kind.BEAT:
                raise ControlError(f"kind {frame.kind} where {kind.name} was expected")

    def close(self) -> None:
        """Hang up; whoever receives is woken. Idempotent."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._incoming.close()

    def _read(self, length: int, timeout_s: float, *, or_none: bool = False) -> bytes | None:
        """`length` bytes; with `or_none`, None if not one of them has come in time."""
        found = bytearray()
        deadline = time.monotonic() + timeout_s
        while len(found) < length:
            try:
                self._incoming.settimeout(max(1e-3, deadline - time.monotonic()))
                part = self._incoming.recv(length - len(found))
            except TimeoutError:
                if or_none and not found:
                    return None
                raise ControlError("the other end stopped amid a frame") from None
            except OSError as error:
                raise ControlError(f"the connection broke ({error})") from None
            if not part:
                raise ControlError("the connection was closed")
            found += part
        return bytes(found)


class Invitation(NamedTuple):
    """What a rank needs in order to join: where rank 0 listens, and what proves that it belongs there."""

    host: str
    port: int
    secret: str
    rank: int


def join(invitation: Invitation, timeout_s: float = 30.0) -> Connection:
    """Connect to rank 0 and say which rank this is. Raises ControlError."""
    try:
        sock = socket.create_connection((invitation.host, invitation.port), timeout_s)
    except OSError as error:
        where = f"{invitation.host}:{invitation.port}"
        raise ControlError(f"rank {invitation.rank} cannot reach rank 0 at {where} ({error})") from None
    connection = Connection(sock)
    try:
        _prove_each_other(connection, invitation.secret, timeout_s)
        connection.send(Kind.HELLO, str(invitation.rank).encode())
    except ControlError:
        connection.close()
        raise
    return connection


def admit(sock: socket.socket, secret: str, timeout_s: float = 10.0) -> tuple[Connection, int]:
    """The other end of `join`: the connection, and the rank that it says it is. Raises ControlError."""
    connection = Connection(sock)
    try:
        _prove_each_other(connection, secret, timeout_s)
        rank = connection.expect(Kind.HELLO, timeout_s).body
        if not rank.isdigit():
            raise ControlError("HELLO names no rank")
    except ControlError:
        connection.close()
        raise
    return connection, int(rank)


def _prove_each_other(connection: Connection, secret: str, timeout_s: float) -> None:
    """Each end signs the other's random number, with its own beside it, so that an echo proves nothing."""
    mine = secrets.token_bytes(_NONCE_BYTES)
    connection.send(Kind.HELLO, mine, timeout_s)
    theirs = connection.expect(Kind.HELLO, timeout_s).body
    if len(theirs) != _NONCE_BYTES or theirs == mine:
        raise ControlError("no handshake")
    connection.send(Kind.HELLO, hmac.digest(secret.encode(), theirs + mine, _DIGEST), timeout_s)
    proof = connection.expect(Kind.HELLO, timeout_s).body
    if not hmac.compare_digest(proof, hmac.digest(secret.encode(), mine + theirs, _DIGEST)):
        raise ControlError("the other end does not know the group's secret")
