"""What can go wrong on the socket between a replica and an ingress.

    TransportError
    ├── FrameError            a frame is malformed, too long, or breaks the protocol
    ├── HandshakeError        the two sides did not come together in time
    │   ├── AuthenticationError  the other side does not know the cluster's secret
    │   ├── VersionError         no protocol version that both sides speak
    │   └── EpochError           another process answers at a replica's address
    ├── SlowReaderError       the other side does not read: its outgoing bytes exceeded their bound or their time
    └── SilenceError          nothing was heard from the other side for too long

None of them reaches a user: the client moves its requests to another replica.
"""

from __future__ import annotations

from engine.errors import QuireError


class TransportError(QuireError):
    """Base of the transport's errors; the connection that raised it is closed."""


class FrameError(TransportError):
    """A frame is malformed, too long, or out of order."""


class HandshakeError(TransportError):
    """The handshake did not complete."""


class AuthenticationError(HandshakeError):
    """The other side failed the challenge: it does not know the cluster's secret."""


class VersionError(HandshakeError):
    """The version ranges of the two sides do not overlap."""


class EpochError(HandshakeError):
    """The process that answers is not the replica that announced the address."""


class SlowReaderError(TransportError):
    """The other side does not read what is sent to it."""


class SilenceError(TransportError):
    """The other side sent nothing, not even a heartbeat, for too long."""
