"""An ingress's line to one replica: dials, subscribes, redials with backoff until told to stop."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import NamedTuple, Protocol

from app.transport.connection import FrameConnection, Limits
from app.transport.errors import TransportError
from app.transport.frames import Frame
from app.transport.handshake import ClientHandshake
from app.transport.messages import PONG, Kind, encode_subscribe

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 2.0


class Endpoint(NamedTuple):
    """Where a replica listens. `epoch` names its process: a restarted replica has another."""

    host: str
    port: int
    epoch: str


class LinkListener(Protocol):
    """Who hears what happens on a link; all calls come on the loop's thread."""

    def link_frame(self, link: Link, frame: Frame) -> None:
        """A frame came. The first LOAD says that the replica has taken the subscription."""
        ...

    def link_down(self, link: Link, cause: Exception | None) -> None:
        """An established link was lost."""
        ...


class Link(Protocol):
    """What a client needs of a link; ReplicaLink is the one on sockets."""

    endpoint: Endpoint

    def send(self, data: bytes) -> None:
        """Send frames; dropped where the link is down, which `link_down` has told or will tell."""
        ...

    def stop_redialing(self) -> None:
        """Stay connected as long as the replica does, but do not come back."""
        ...

    def close(self) -> None:
        """Hang up for good."""
        ...


class ReplicaLink:
    """A Link over TCP. Made on a running loop; dials at once."""

    def __init__(
        self,
        endpoint: Endpoint,
        ingress_id: str,
        secret: bytes,
        listener: LinkListener,
        limits: Limits | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._ingress_id = ingress_id
        self._secret = secret
        self._listener = listener
        self._limits = limits or Limits()
        self._redial = True
        self._connection: FrameConnection | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"link {endpoint.host}:{endpoint.port}")

    def send(self, data: bytes) -> None:
        if self._connection is not None and self._connection.ready:
            self._connection.send(data)

    def stop_redialing(self) -> None:
        self._redial = False
        if self._connection is None:
            self._task.cancel()

    def close(self) -> None:
        self._redial = False
        self._task.cancel()
        if self._connection is not None:
            self._connection.close()

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        last_complaint = ""
        while self._redial:
            try:
                was_ready, cause = await self._connect_once()
            except OSError as error:
                was_ready, cause = False, error
            if was_ready:
                backoff_s, last_complaint = _FIRST_BACKOFF_S, ""
                self._listener.link_down(self, cause)
            if not self._redial:
                return
            complaint = f"{type(cause).__name__}: {cause}" if cause else "closed by the replica"
            if complaint != last_complaint:
                last_complaint = complaint
                severe = isinstance(cause, TransportError)
                level = logging.WARNING if severe else logging.INFO
                logger.log(level, "replica at %s:%d: %s; dialling again", *self.endpoint[:2], complaint)
            # Jitter keeps a fleet of ingresses from dialling a returning replica in step.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, _LAST_BACKOFF_S)

    async def _connect_once(self) -> tuple[bool, Exception | None]:
        """One connection from dialling to its end: (whether the handshake went through, why it ended)."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[bool, Exception | None]] = loop.create_future()
        ready = False

        def on_ready(connection: FrameConnection) -> None:
            nonlocal ready
            ready = True
            connection.send(encode_subscribe(self._ingress_id))

        def on_closed(_: FrameConnection, cause: Exception | None) -> None:
            if not ended.done():
                ended.set_result((ready, cause))

        async with asyncio.timeout(self._limits.handshake_s):
            _, connection = await loop.create_connection(
                lambda: FrameConnection(
                    ClientHandshake(self._secret, self.endpoint.epoch),
                    self._limits,
                    on_ready=on_ready,
                    on_frame=self._on_frame,
                    on_closed=on_closed,
                ),
                self.endpoint.host,
                self.endpoint.port,
            )
        self._connection = connection
        try:
            return await ended
        finally:
            self._connection = None
            connection.close()

    def _on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        if frame.kind == Kind.HEARTBEAT:
            connection.send(PONG)
        self._listener.link_frame(self, frame)
