"""The replica's end of its sockets: a thread and an event loop of its own, so that nothing holds up tokens."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from app.transport.block_messages import decode_sync
from app.transport.connection import FrameConnection, Limits
from app.transport.demand_messages import DemandShare, decode_demand
from app.transport.errors import FrameError, TransportError
from app.transport.frames import Frame
from app.transport.handshake import ServerHandshake
from app.transport.messages import HEARTBEAT, Kind, decode_abort, decode_stop, decode_subscribe
from app.transport.submit_messages import Submission, decode_submit

logger = logging.getLogger("ray.serve")


class StreamListener(Protocol):
    """Who hears of the ingresses; all calls come on the server's thread."""

    def subscribed(self, ingress_id: str) -> None:
        """An ingress has come; it expects the replica's load."""
        ...

    def unsubscribed(self, ingress_id: str) -> None:
        """An ingress has gone: nobody reads its requests any more."""
        ...

    def aborted(self, ingress_id: str, attempts: Iterable[int]) -> None:
        """An ingress has given up these attempts."""
        ...

    def stopped(self, ingress_id: str, attempt: int, index: int) -> None:
        """An ingress needs no more of one sequence of an attempt."""
        ...

    def synced(self, ingress_id: str, number: int) -> None:
        """An ingress knows the prefix cache up to this change, and wants those that came after."""
        ...

    def submitted(self, ingress_id: str, submission: Submission) -> None:
        """A request of an ingress, ahead of its Serve call."""
        ...

    def demanded(self, ingress_id: str, share: DemandShare) -> None:
        """This replica's share of what an ingress was asked for since it last told."""
        ...


class StreamServer:
    """Accepts ingresses, authenticates them and sends them frames.

    Args:
        host: address to bind; the port is the system's choice.
        epoch: names this process, so that an ingress never mistakes another for it.
    """

    def __init__(self, host: str, epoch: str, secret: bytes, limits: Limits | None = None) -> None:
        self.host = host
        self.port = 0
        self._epoch = epoch
        self._secret = secret
        self._limits = limits or Limits()
        self._listener: StreamListener | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="quire-streams", daemon=True)
        self._server: asyncio.Server | None = None
        self._subscribers: dict[str, FrameConnection] = {}
        self._connections: dict[FrameConnection, str | None] = {}

    def start(self, listener: StreamListener) -> None:
        """Bind and begin to accept. Raises OSError if `host` is no address of this machine."""
        self._listener = listener
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._bind(), self._loop).result()

    def close(self) -> None:
        """Send what is written, hang up and end the thread. Idempotent; not from the server's own thread."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def call_soon(self, callback: Callable[..., None], *args: object) -> None:
        """Run a callback on the server's thread; dropped after `close`. Any thread, a few microseconds."""
        # A closed loop raises: the replica is going, and its ingresses know.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: object) -> asyncio.TimerHandle:
        """Run a callback on the server's thread after a delay. From that thread."""
        return self._loop.call_later(delay_s, callback, *args)

    def is_subscribed(self, ingress_id: str) -> bool:
        """Whether that ingress is connected. Any thread."""
        return ingress_id in self._subscribers

    @property
    def subscribers(self) -> tuple[str, ...]:
        """Ids of the connected ingresses."""
        return tuple(self._subscribers)

    def send(self, ingress_id: str, data: bytes) -> None:
        """Send whole frames in one write; dropped if the ingress has gone. From the server's thread."""
        connection = self._subscribers.get(ingress_id)
        if connection is not None:
            connection.send(data)

    async def _bind(self) -> None:
        self._server = await self._loop.create_server(self._new_connection, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _hang_up(self) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.close()
        # A peer that does not read would hold the close for ever.
        for _ in range(20):
            if not self._connections:
                return
            await asyncio.sleep(0.05)
        for connection in list(self._connections):
            connection.fail(TransportError("the replica closes"))
        await asyncio.sleep(0)

    def _new_connection(self) -> FrameConnection:
        return FrameConnection(
            ServerHandshake(self._secret, self._epoch),
            self._limits,
            on_ready=self._on_ready,
            on_frame=self._on_frame,
            on_closed=self._on_closed,
            beat=HEARTBEAT,
        )

    def _on_ready(self, connection: FrameConnection) -> None:
        self._connections[connection] = None

    def _on_frame(self, connection: FrameConnection, frame: Frame) -> None:
        assert self._listener is not None
        if frame.kind == Kind.SUBSCRIBE:
            self._subscribe(connection, decode_subscribe(frame))
        elif frame.kind == Kind.ABORT:
            self._listener.aborted(self._subscriber(connection, "ABORT"), decode_abort(frame))
        elif frame.kind == Kind.STOP:
            self._listener.stopped(self._subscriber(connection, "STOP"), *decode_stop(frame))
        elif frame.kind == Kind.SYNC:
            self._listener.synced(self._subscriber(connection, "SYNC"), decode_sync(frame))
        elif frame.kind == Kind.SUBMIT:
            ingress_id, submission = self._subscriber(connection, "SUBMIT"), decode_submit(frame)
            if submission is not None:
                self._listener.submitted(ingress_id, submission)
        elif frame.kind == Kind.DEMAND:
            self._listener.demanded(self._subscriber(connection, "DEMAND"), decode_demand(frame))
        # Other kinds are a newer version's, or a PONG, whose arrival was all it had to say.

    def _subscriber(self, connection: FrameConnection, kind: str) -> str:
        ingress_id = self._connections[connection]
        if ingress_id is None:
            raise FrameError(f"{kind} before SUBSCRIBE")
        return ingress_id

    def _subscribe(self, connection: FrameConnection, ingress_id: str) -> None:
        assert self._listener is not None
        if self._connections[connection] is not None:
            raise FrameError("a second SUBSCRIBE on one connection")
        previous = self._subscribers.get(ingress_id)
        if previous is not None:
            # The ingress dialled again before we saw its old line break; what ran over that line is given up there.
            self._connections[previous] = None
            previous.fail(TransportError("replaced by a newer connection of the same ingress"))
            self._forget(ingress_id)
        self._connections[connection] = ingress_id
        self._subscribers[ingress_id] = connection
        self._listener.subscribed(ingress_id)

    def _on_closed(self, connection: FrameConnection, cause: Exception | None) -> None:
        ingress_id = self._connections.pop(connection, None)
        if cause is not None:
            logger.warning("Connection of ingress %s closed: %s: %s", ingress_id, type(cause).__name__, cause)
        if ingress_id is not None:
            self._forget(ingress_id)

    def _forget(self, ingress_id: str) -> None:
        assert self._listener is not None
        # Gone from the table before its requests are ended, so that no new one can slip in between.
        del self._subscribers[ingress_id]
        self._listener.unsubscribed(ingress_id)
