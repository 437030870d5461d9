"""One streamed completion after another over one raw HTTP/1.1 connection.

A load generator shares the machine with the server, and its CPU time counts as serving's: what it does for an event is
to note the time and count. Only the last bytes of a stream are looked into, for its usage.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import cast
from urllib.parse import SplitResult

# The usage, and whatever error a stream ends with, lie in its last bytes.
_TAIL_BYTES = 2048


@dataclass(slots=True)
class StreamRecord:
    """What one request met. Times are of `time.perf_counter`; `event_s` has one for each piece that brought events.

    `num_events` counts server-sent events, which may bring several tokens each. `retry_after_s` is set if it was
    refused and told when to come again.
    """

    due_s: float
    sent_s: float = 0.0
    first_s: float | None = None
    end_s: float = 0.0
    num_events: int = 0
    num_output_tokens: int = 0
    error: str | None = None
    event_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    retry_after_s: int | None = None

    @property
    def ttft_s(self) -> float:
        """From when the request was due, so that a late generator hides nothing, to its first text."""
        assert self.first_s is not None
        return self.first_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for a single one."""
        if self.first_s is None or self.num_output_tokens < 2:
            return None
        return (self.event_s[-1] - self.first_s) / (self.num_output_tokens - 1)


class _State(Enum):
    IDLE = auto()
    HEAD = auto()
    CHUNKS = auto()
    LENGTH = auto()
    UNTIL_CLOSE = auto()


class Connection(asyncio.Protocol):
    """One connection: `exchange` sends a request and reads its answer to the end."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._state = _State.IDLE
        self._buffer = b""
        self._tail = b""
        self._remaining = 0
        self._status = 0
        self._record = StreamRecord(0.0)
        self._done: asyncio.Future[None] | None = None

    async def exchange(self, payload: bytes, record: StreamRecord) -> None:
        """Send one request, fill the record in as the answer comes. What goes wrong is in `record.error`."""
        assert self._transport is not None
        assert self._state is _State.IDLE
        self._record, self._state, self._buffer, self._tail = record, _State.HEAD, b"", b""
        self._done = asyncio.get_running_loop().create_future()
        record.sent_s = time.perf_counter()
        self._transport.write(payload)
        await self._done
        self._finish()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods but not the base class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._state is not _State.UNTIL_CLOSE and self._state is not _State.IDLE:
            self._record.error = f"the connection broke: {exc or 'closed by the server'}"
        self._end()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        if self._buffer:
            data = self._buffer + data
        if self._state is _State.HEAD:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._buffer = head
                return
            self._read_head(head)
        if self._state is _State.CHUNKS:
            self._buffer = self._read_chunks(data, now_s)
        else:
            self._buffer = b""
            self._remaining -= len(data)
            self._take(data, now_s)
            if self._state is _State.LENGTH and self._remaining <= 0:
                self._end()

    def _read_head(self, head: bytes) -> None:
        status, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._status = int(status.split(" ", 2)[1])
        if headers.get("retry-after", "").isdecimal():
            self._record.retry_after_s = int(headers["retry-after"])
        if "chunked" in headers.get("transfer-encoding", ""):
            self._state = _State.CHUNKS
        elif "content-length" in headers:
            self._state, self._remaining = _State.LENGTH, int(headers["content-length"])
        else:
            self._state = _State.UNTIL_CLOSE

    def _read_chunks(self, data: bytes, now_s: float) -> bytes:
        """Take the whole chunks; returns what is not whole yet."""
        position = 0
        while (line_end := data.find(b"\r\n", position)) >= 0:
            size = int(data[position:line_end], 16)
            start = line_end + 2
            if len(data) < start + size + 2:
                break
            position = start + size + 2
            if size == 0:
                self._end()
                return b""
            self._take(data[start : start + size], now_s)
        return data[position:]

    def _take(self, piece: bytes, now_s: float) -> None:
        record = self._record
        self._tail = (self._tail + piece)[-_TAIL_BYTES:]
        if piece.startswith(b":") and b"data: " not in piece:
            return  # a comment that keeps the connection open
        # JSON holds no bare newline, so that this counts events and nothing else.
        record.num_events += piece.count(b"\n\n")
        record.event_s.append(now_s)
        if record.first_s is None and self._status == 200:
            record.first_s = now_s

    def _end(self) -> None:
        self._state = _State.IDLE
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _finish(self) -> None:
        """Read the usage, or the error, off the answer's end."""
        record = self._record
        record.end_s = time.perf_counter()
        if record.error is None and self._status != 200:
            record.error = f"status {self._status}: {self._tail.decode(errors='replace')[:300]}"
        for line in reversed(self._tail.split(b"\n")):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                record.error = str(event["error"])[:300]
            usage = event.get("usage") or {}
            record.num_output_tokens = int(usage.get("completion_tokens", 0))
            record.num_cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
            break
        if record.error is None and not record.num_output_tokens:
            record.error = "the stream ended without its usage"


def completion_request(
    url: SplitResult,
    body: dict[str, object],
    api_key: str | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """A POST of /v1/completions, as bytes."""
    content = json.dumps(body, separators=(",", ":")).encode()
    path = url.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
    head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    if api_key:
        head += f"Authorization: Bearer {api_key}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content
