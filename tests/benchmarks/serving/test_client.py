"""The load generator against a server that says what the test wrote."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import SplitResult, urlsplit

import pytest

from benchmarks.serving.client import StreamRecord, completion_request
from benchmarks.serving.load import Load, run_load

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices":[{"index":0,"text":"x"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


WHOLE = [HEAD, chunk(TEXT), chunk(TEXT + TEXT), chunk(USAGE + DONE) + chunk(b"")]


class Server:
    """Answers every request with the same pieces, some time apart. Keeps what it was sent."""

    def __init__(self, pieces: list[bytes], gap_s: float, *, hang_up: bool) -> None:
        self.pieces, self.gap_s, self.hang_up = pieces, gap_s, hang_up
        self.requests: list[bytes] = []
        self.handlers: list[asyncio.Task[None] | None] = []
        self.num_connections = self.num_open = self.most_open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.handlers.append(asyncio.current_task())
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                self.requests.append(await reader.readexactly(length))
                self.num_open += 1
                self.most_open = max(self.most_open, self.num_open)
                for piece in self.pieces:
                    writer.write(piece)
                    await asyncio.sleep(self.gap_s)
                self.num_open -= 1
                if self.hang_up:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def served(
    pieces: list[bytes], gap_s: float = 0.0, *, hang_up: bool = False
) -> AsyncIterator[tuple[Server, SplitResult]]:
    server = Server(pieces, gap_s, hang_up=hang_up)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener:
        yield server, urlsplit(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1")
        await asyncio.gather(*(task for task in server.handlers if task is not None))


async def ask(url: SplitResult, count: int = 1, concurrency: int = 1) -> list[StreamRecord]:
    payload = completion_request(url, {"model": "m", "prompt": [1, 2]})
    return await run_load(url, Load([payload] * count, concurrency))


async def test_a_stream_is_timed_and_counted() -> None:
    async with served(WHOLE, 0.05) as (server, url):
        (record,) = await ask(url)
    assert record.error is None
    assert json.loads(server.requests[0]) == {"model": "m", "prompt": [1, 2]}
    assert (record.num_output_tokens, record.num_events) == (3, 5)
    assert 0.04 < record.ttft_s < 1.0
    assert record.tpot_s == pytest.approx((record.event_s[-1] - record.event_s[0]) / 2)
    assert record.tpot_s is not None
    assert record.tpot_s > 0.04


async def test_how_the_bytes_are_cut_changes_nothing() -> None:
    stream = b"".join(WHOLE)
    for size in (1, 3, 7, 64):
        async with served([stream[at : at + size] for at in range(0, len(stream), size)], 0.0005) as (_, url):
            (record,) = await ask(url)
        assert (record.error, record.num_output_tokens, record.num_events) == (None, 3, 5)


async def test_comments_are_no_first_token() -> None:
    async with served([HEAD, chunk(b": keep-alive\n\n"), *WHOLE[1:]], 0.05) as (_, url):
        (record,) = await ask(url)
    assert record.num_events == 5
    assert record.ttft_s > 0.09, "the comment was taken for text"


async def test_connections_are_kept_and_concurrency_is_what_was_asked() -> None:
    async with served(WHOLE, 0.01) as (server, url):
        records = await ask(url, 12, 4)
    assert len(server.requests) == len(records) == 12
    assert (server.num_connections, server.most_open) == (4, 4)


async def test_an_open_loop_sends_when_it_is_time_however_late_the_server() -> None:
    async with served(WHOLE, 0.1) as (server, url):
        payload = completion_request(url, {})
        records = await run_load(url, Load([payload] * 3, 1, [0.0, 0.05, 0.1]))
    assert server.most_open == 3, "a request waited for the one before"
    assert [round(record.due_s - records[0].due_s, 2) for record in records] == [0.0, 0.05, 0.1]


@pytest.mark.parametrize(
    ("pieces", "hang_up", "message"),
    [
        (
            [b'HTTP/1.1 404 Not Found\r\ncontent-length: 15\r\n\r\n{"error": "no"}'],
            False,
            'status 404: {"error": "no"}',
        ),
        ([HEAD, chunk(TEXT), chunk(b'data: {"error":{"message":"gone"}}\n\n') + chunk(b"")], False, "gone"),
        ([HEAD, chunk(TEXT), chunk(DONE) + chunk(b"")], False, "without its usage"),
        ([HEAD, chunk(TEXT)], True, "the connection broke"),
        ([b"HTTP/1.1 200 OK\r\n\r\n" + TEXT + USAGE], True, None),
    ],
)
async def test_what_goes_wrong_is_kept(pieces: list[bytes], hang_up: bool, message: str | None) -> None:
    async with served(pieces, hang_up=hang_up) as (_, url):
        (record,) = await ask(url)
    if message is None:
        assert record.error is None, "an answer without a length ends with its connection"
    else:
        assert message in str(record.error)
