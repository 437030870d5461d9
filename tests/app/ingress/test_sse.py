"""A client that goes away, and a task that Serve cancels: the model's generator is closed at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.types import Message

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat

pytestmark = pytest.mark.anyio

LONG = "word " * 200


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what a test cannot be told of."""
    async with asyncio.timeout(10.0):
        while not condition():  # noqa: ASYNC110 - that is the point
            await asyncio.sleep(0.001)


class Connection:
    """One request at the ASGI level, which a test can hang up."""

    def __init__(self, app: Starlette, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        self._gone = asyncio.Event()
        self._body_read = False
        self._body = json.dumps(body).encode()
        self.sent: list[Message] = []
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        self.task: asyncio.Task[None] = asyncio.ensure_future(app(scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._gone.set()

    async def _receive(self) -> Message:
        if not self._body_read:
            self._body_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


@pytest.fixture
def slow(tokenizer: Tokenizer) -> ScriptedClient:
    return ScriptedClient(tokenizer, LONG, step_s=0.005)


@pytest.fixture
def app(slow: ScriptedClient, tokenizer: Tokenizer) -> Starlette:
    return build_asgi_app(ModelRegistry([ServedModel("tiny", slow, tokenizer, 512)]))


async def test_a_disconnect_while_streaming_closes_the_generator(app: Starlette, slow: ScriptedClient) -> None:
    connection = Connection(app, chat(stream=True))
    await until(lambda: len(connection.sent) >= 5)
    connection.hang_up()
    await asyncio.wait_for(connection.task, 1.0)
    assert slow.closed == 1
    assert slow.num_yielded < 20


async def test_a_disconnect_before_the_first_token_closes_the_generator(
    app: Starlette, slow: ScriptedClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "_step_s", 60.0)
    for stream in (False, True):
        connection = Connection(app, chat(stream=stream))
        await until(lambda: len(slow.requests) == slow.closed + 1)
        connection.hang_up()
        await asyncio.wait_for(connection.task, 1.0)
        assert slow.closed == 1 + stream


async def test_a_disconnect_without_streaming_closes_the_generator(app: Starlette, slow: ScriptedClient) -> None:
    connection = Connection(app, {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 200}, "/v1/completions")
    await until(lambda: slow.num_yielded >= 6)
    connection.hang_up()
    await asyncio.wait_for(connection.task, 1.0)
    assert slow.closed == 2, "one generator a prompt"
    assert not connection.sent


async def test_a_cancelled_task_closes_the_generator(app: Starlette, slow: ScriptedClient) -> None:
    for stream in (False, True):
        connection = Connection(app, chat(stream=stream))
        before = slow.num_yielded
        await until(lambda: slow.num_yielded >= before + 6)  # noqa: B023 - awaited here
        connection.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connection.task
        assert slow.closed == 1 + stream


async def test_a_finished_stream_is_not_aborted(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(tokenizer, "done")
    connection = Connection(
        build_asgi_app(ModelRegistry([ServedModel("tiny", client, tokenizer, 512)])), chat(stream=True)
    )
    await asyncio.wait_for(connection.task, 5.0)
    assert client.closed == 0
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
