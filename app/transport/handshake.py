"""The handshake: both sides prove that they know the cluster's secret and agree on a version. No I/O here.

    ingress                                        replica
      HELLO      magic, versions, nonce        →
                                               ←   CHALLENGE  versions, nonce, epoch, proof of the replica
      PROOF      proof of the ingress          →
                                               ←   WELCOME    version            (or REJECT code, reason)

A proof is HMAC-SHA256(secret, role ‖ transcript), the transcript being every field of HELLO and CHALLENGE: nobody can
replay it, reflect it, or talk the two down to an older version. What follows is neither encrypted nor signed: the
sockets belong on the cluster's own network, as Ray's do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from app.transport.errors import AuthenticationError, EpochError, FrameError, HandshakeError, VersionError
from app.transport.frames import Frame, encode_frame

MAGIC = "quire"
# Version 2 has DEMAND, version 3 SUBMIT.
MIN_VERSION = 1
MAX_VERSION = 3
# Until a peer has proved itself it may not make us hold more than this.
MAX_HANDSHAKE_BYTES = 1024

_NONCE_BYTES = 32


class Hand(IntEnum):
    """Kinds of the handshake's frames."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REJECT = 5


class Versions(NamedTuple):
    """The protocol versions a side speaks, both ends included."""

    lowest: int = MIN_VERSION
    highest: int = MAX_VERSION

    def common(self, other: Versions) -> int:
        """The newest version both speak. Raises VersionError."""
        newest = min(self.highest, other.highest)
        if newest < max(self.lowest, other.lowest):
            raise VersionError(
                f"no common protocol version: {self.lowest} to {self.highest} here, "
                f"{other.lowest} to {other.highest} there"
            )
        return newest


class ServerHandshake:
    """The replica's side. `feed` each frame and send what it returns, until `version` is set."""

    def __init__(self, secret: bytes, epoch: str, versions: Versions | None = None) -> None:
        self.version: int | None = None
        self._secret = secret
        self._epoch = epoch
        self._versions = versions or Versions()
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._transcript: bytes | None = None
        self._agreed = 0

    def opening(self) -> bytes:
        """The replica waits for the ingress to speak."""
        return b""

    def feed(self, frame: Frame) -> bytes:
        """The reply to a frame. Raises HandshakeError or FrameError."""
        if self._transcript is None:
            magic, versions, nonce = _hello(frame)
            if magic != MAGIC:
                raise FrameError(f"HELLO of another protocol: {magic!r}")
            self._agreed = self._versions.common(versions)
            self._transcript = _transcript(versions, nonce, self._versions, self._nonce, self._epoch)
            proof = _proof(self._secret, b"replica", self._transcript)
            return encode_frame(Hand.CHALLENGE, *self._versions, self._nonce, self._epoch, proof)
        (proof,) = _fields(frame, Hand.PROOF, bytes)
        if not hmac.compare_digest(proof, _proof(self._secret, b"ingress", self._transcript)):
            raise AuthenticationError("the ingress does not know the cluster's secret")
        self.version = self._agreed
        return encode_frame(Hand.WELCOME, self._agreed)


class ClientHandshake:
    """The ingress's side; `epoch` is the one the replica announced through Serve."""

    def __init__(self, secret: bytes, epoch: str, versions: Versions | None = None) -> None:
        self.version: int | None = None
        self._secret = secret
        self._epoch = epoch
        self._versions = versions or Versions()
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._agreed: int | None = None

    def opening(self) -> bytes:
        """HELLO."""
        return encode_frame(Hand.HELLO, MAGIC, *self._versions, self._nonce)

    def feed(self, frame: Frame) -> bytes:
        """The reply to a frame. Raises HandshakeError or FrameError."""
        if frame.kind == Hand.REJECT:
            raise _rejection(frame)
        if self._agreed is None:
            lowest, highest, nonce, epoch, proof = _fields(frame, Hand.CHALLENGE, int, int, bytes, str, bytes)
            theirs = Versions(lowest, highest)
            transcript = _transcript(self._versions, self._nonce, theirs, nonce, epoch)
            if not hmac.compare_digest(proof, _proof(self._secret, b"replica", transcript)):
                raise AuthenticationError("the replica does not know the cluster's secret")
            if epoch != self._epoch:
                raise EpochError(f"replica of epoch {epoch} answers where {self._epoch} was announced")
            self._agreed = self._versions.common(theirs)
            return encode_frame(Hand.PROOF, _proof(self._secret, b"ingress", transcript))
        (version,) = _fields(frame, Hand.WELCOME, int)
        if version != self._agreed:
            raise FrameError(f"WELCOME names version {version}, agreed was {self._agreed}")
        self.version = version
        return b""


def reject_frame(error: HandshakeError) -> bytes:
    """What a replica sends before it closes, so that the other side's log says why."""
    return encode_frame(Hand.REJECT, type(error).__name__, str(error)[:200])


def _rejection(frame: Frame) -> HandshakeError:
    code, reason = _fields(frame, Hand.REJECT, str, str)
    kinds: dict[str, type[HandshakeError]] = {kind.__name__: kind for kind in (AuthenticationError, VersionError)}
    return kinds.get(code, HandshakeError)(f"refused by the replica: {reason}")


def _hello(frame: Frame) -> tuple[str, Versions, bytes]:
    magic, lowest, highest, nonce = _fields(frame, Hand.HELLO, str, int, int, bytes)
    if len(nonce) != _NONCE_BYTES:
        raise FrameError(f"HELLO has a nonce of {len(nonce)} bytes, {_NONCE_BYTES} expected")
    return magic, Versions(lowest, highest), nonce


def _fields(frame: Frame, kind: Hand, *types: type) -> tuple[Any, ...]:
    if frame.kind != kind:
        raise FrameError(f"{kind.name} expected, frame of kind {frame.kind} came")
    values = frame.fields[: len(types)]
    if len(values) < len(types) or any(
        type(value) is not expected for value, expected in zip(values, types, strict=True)
    ):
        raise FrameError(f"{kind.name} has fields of wrong number or type")
    return values


def _transcript(client: Versions, client_nonce: bytes, server: Versions, server_nonce: bytes, epoch: str) -> bytes:
    packed: bytes = msgpack.packb((MAGIC, *client, client_nonce, *server, server_nonce, epoch), use_bin_type=True)
    return packed


def _proof(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.new(secret, role + b"\0" + transcript, hashlib.sha256).digest()
