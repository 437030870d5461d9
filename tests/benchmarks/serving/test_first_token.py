"""First tokens over HTTP and of the engine alone, in turn."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.cpu.requests import Request, write_requests
from benchmarks.serving.client import completion_request
from benchmarks.serving.first_token import EngineProcess, measure_pairs, serve_lines
from engine import LLM
from engine.async_engine import AsyncLLMEngine

OPTIONS = {"num_blocks": 64, "num_threads": 1, "dtype": "float32"}
REQUESTS = [Request([1, 2, 3, number], 5) for number in range(4)]
ANSWER = b'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[],"usage":{"completion_tokens":1}}\n\ndata: [DONE]\n\n'


class _Engine(EngineProcess):
    """Notes when it is asked, among what the server notes."""

    def __init__(self, order: list[str]) -> None:
        self._order = order

    def first_token_s(self, number: int) -> float:
        self._order.append(f"engine {number}")
        return 0.001


async def _pairs(order: list[str], status: bytes = b"200 OK") -> list[float]:
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                body = json.loads(data.partition(b"\r\n\r\n")[2])
                order.append(f"http {body['prompt'][0]}")
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER)
        except ConnectionResetError:
            pass
        finally:
            writer.transport.abort()
            hung_up.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = urlsplit(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        payloads = [completion_request(url, {"prompt": [number]}) for number in range(3)]
        try:
            return [pair.http_s - pair.alone_s for pair in await measure_pairs(url, payloads, _Engine(order))]
        finally:
            await hung_up.wait()
            await asyncio.sleep(0)


def test_the_two_take_turns_and_either_goes_first() -> None:
    order: list[str] = []
    assert len(asyncio.run(_pairs(order))) == 3
    assert order == ["engine 0", "http 0", "http 1", "engine 1", "engine 2", "http 2"]


def test_a_request_that_fails_over_http_ends_the_measurement() -> None:
    with pytest.raises(RuntimeError, match="status 503"):
        asyncio.run(_pairs([], b"503 Service Unavailable"))


def test_the_engine_is_asked_by_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n0\n"))
    engine = AsyncLLMEngine(LLM("dummy:tiny", **OPTIONS).engine)
    engine.start()
    try:
        asyncio.run(serve_lines(engine, REQUESTS))
    finally:
        engine.shutdown()
    ready, *seconds = capsys.readouterr().out.split()
    assert ready == "ready"
    assert len(seconds) == 2
    assert all(float(second) > 0 for second in seconds)


def test_an_engine_that_cannot_start_is_no_endless_wait(tmp_path: Path) -> None:
    write_requests(tmp_path / "requests.json", REQUESTS)
    with pytest.raises(EOFError):
        EngineProcess(tmp_path / "requests.json", "dummy:no-such-model", ())
