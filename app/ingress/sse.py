"""Server-sent events: the response that streams them, and what all event writers share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.ingress.errors import ClientDisconnectedError, error_event, status_of
from app.ingress.generation import ChoiceDelta, Generation
from app.ingress.pacing import Pacer
from app.telemetry.ingress_metrics import RequestRecord
from engine.errors import QuireError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# Clients skip comments; what lies between sees that the stream lives.
KEEP_ALIVE = b": keep-alive\n\n"
# Where an application keeps, in a request's scope, the `send` of its server.
SERVER_SEND = "quire.server_send"
T = TypeVar("T")

# One encoder for all: `json.dumps` with options builds a new one each call.
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8."""
    return _encode(value).encode()


class EventWriter(Protocol):
    """Writes one stream's events as bytes; `chat.py` and `completions.py` have one each."""

    def start(self) -> bytes:
        """Events before the first text."""
        ...

    def write(self, delta: ChoiceDelta) -> bytes:
        """Events of one delta; a finish reason is in the last of its choice."""
        ...

    def usage(self) -> bytes:
        """The event that tells usage and receipts at the end, or nothing if neither was asked for."""
        ...


class Envelope:
    """The parts of a stream's events that stay the same, serialised once.

    An event is `prefix + choice + suffix`, the choice being the JSON object without its brackets around it.
    """

    def __init__(
        self, fields: Mapping[str, Any], generation: Generation, *, include_usage: bool, continuous: bool
    ) -> None:
        self._generation = generation
        self._head = b"data: " + to_json(fields)[:-1]
        self._prefix = self._head + b',"choices":[{'
        self._suffix = b'}],"usage":null}\n\n' if include_usage else b"}]}\n\n"
        self._include_usage = include_usage
        self._continuous = continuous

    def event(self, choice: bytes) -> bytes:
        """One event with one choice."""
        if self._continuous:
            return self._prefix + choice + b'}],"usage":' + to_json(self._generation.usage.as_dict()) + b"}\n\n"
        return self._prefix + choice + self._suffix

    def usage(self) -> bytes:
        """The event without choices that ends a stream with `include_usage`, or with route receipts."""
        fields = self._generation.receipt_fields()
        if self._include_usage:
            fields = {"usage": self._generation.usage.as_dict(), **fields}
        return self._head + b',"choices":[],' + to_json(fields)[1:] + b"\n\n" if fields else b""


async def write_events(
    first: Awaitable[list[ChoiceDelta]],
    rest: AsyncGenerator[list[ChoiceDelta], None],
    writer: EventWriter,
    record: RequestRecord,
) -> AsyncGenerator[bytes, None]:
    """Yield a stream's events, several in one piece where they came together; an error is the last event.

    `record` gets the status that the stream would have had, were it not 200 from its first byte on.
    """
    async with aclosing(rest):
        try:
            yield writer.start() + b"".join(map(writer.write, await first))
            async for deltas in rest:
                yield b"".join(map(writer.write, deltas))
            record.code = HTTPStatus.OK
            yield writer.usage() + DONE
        except QuireError as error:
            record.code = status_of(error)
            yield error_event(error)
        except Exception as error:
            logger.exception("a stream failed after it began")
            record.code = status_of(error)
            yield error_event(error)


class EventStreamResponse(Response):
    """Streams events until they end or the client goes away; then the generator is closed at once.

    Starlette's StreamingResponse relies on `send` failing for a client that has gone; behind Serve it never does. The
    answer's start goes through all layers of the application, and what follows straight to the server, if the scope
    tells its `send`.

    Args:
        keep_alive_s: a comment goes out whenever this long has passed without an event.
        pacer: says how long to hold what comes after an event.
        record: of the request; ends with the stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], keep_alive_s: float, pacer: Pacer, record: RequestRecord
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._pacer = pacer
        self._record = record
        self._num_sent = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._stream(send, scope.get(SERVER_SEND, send)))
        finally:
            self._record.end()

    async def _stream(self, start: Send, send: Send) -> None:
        async with aclosing(self._events) as events:
            await start({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            comments = asyncio.create_task(self._keep_alive(send))
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                    self._num_sent += 1
                    if hold_s := self._pacer.hold_s():
                        await asyncio.sleep(hold_s)
            finally:
                comments.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Beside the events, so that none of them costs a timer: looks whether any has gone out since the last look."""
        while True:
            seen = self._num_sent
            await asyncio.sleep(self._keep_alive_s)
            if self._num_sent == seen:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelled as soon as the client disconnects; ClientDisconnectedError then.

    The request's body must have been read: what `receive` brings after it can only be the disconnect.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError
    finally:
        # Also when this task itself is cancelled, which is how Serve passes a disconnect on.
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
