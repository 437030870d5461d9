"""Streams: a client that goes away, a task that Serve cancels, a request that waits, an ingress that is busy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx2
import openai
import pytest
from starlette.applications import Starlette
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.balancer import RequestTerms
from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.pacing import Pacer
from app.ingress.receipt import Receipt
from app.ingress.request_journal import RequestJournal
from app.ingress.settings import HttpSettings
from engine.errors import EngineDeadError, OverloadedError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import BASE_URL, ScriptedClient, chat

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


class Queued:
    """A client whose tokens come whether or not they are read, as over a socket; what is unread is joined."""

    def __init__(self, client: ScriptedClient) -> None:
        self._client = client
        self.wait_ready, self.state, self.stop = client.wait_ready, client.state, client.stop
        self.telemetry = client.telemetry
        self.admission = client.admission

    async def generate(
        self,
        request: EngineRequest,
        receipt: Receipt | None = None,  # noqa: ARG002 - nobody asks for one
        terms: RequestTerms | None = None,  # noqa: ARG002 - nothing waits
    ) -> AsyncGenerator[list[SequenceOutput], None]:
        journal = RequestJournal(request, 10_000)
        feeding = asyncio.ensure_future(self._feed(journal, request))
        finished = False
        while not finished:
            outputs = await journal.read()
            finished = outputs[-1].request_finished
            yield outputs
        await feeding

    async def _feed(self, journal: RequestJournal, request: EngineRequest) -> None:
        async for outputs in self._client.generate(request):
            for output in outputs:
                journal.add(output)
        journal.finish()


def text_of(pieces: list[bytes]) -> str:
    """The text of a chat stream's events."""
    events = [json.loads(line[6:]) for line in b"".join(pieces).split(b"\n") if line.startswith(b"data: {")]
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


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


async def test_a_request_that_waits_gets_comments(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(tokenizer, "done", step_s=60.0)
    app = build_asgi_app(ModelRegistry([ServedModel("tiny", client, tokenizer, 512)]), HttpSettings(keep_alive_s=0.02))
    connection = Connection(app, chat(stream=True))
    await until(lambda: len(connection.sent) >= 4)
    assert connection.sent[0]["type"] == "http.response.start"
    assert connection.sent[0]["status"] == 200
    assert {message["body"] for message in connection.sent[1:]} == {b": keep-alive\n\n"}
    connection.hang_up()
    await asyncio.wait_for(connection.task, 1.0)
    assert client.closed == 1, "a client that leaves while it waits ends its request"


async def test_a_stream_with_news_gets_no_comments(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(tokenizer, "word " * 40, step_s=0.005)
    app = build_asgi_app(ModelRegistry([ServedModel("tiny", client, tokenizer, 512)]), HttpSettings(keep_alive_s=0.1))
    connection = Connection(app, chat(stream=True))
    await asyncio.wait_for(connection.task, 10.0)
    assert not [message for message in connection.sent if message.get("body", b"").startswith(b":")]


async def test_a_failure_after_the_comments_have_begun_is_the_last_event(tokenizer: Tokenizer) -> None:
    client = ScriptedClient(tokenizer, "done", step_s=0.05)
    client.failure = (1, EngineDeadError("no replica is left"))
    app = build_asgi_app(ModelRegistry([ServedModel("tiny", client, tokenizer, 512)]), HttpSettings(keep_alive_s=0.01))
    connection = Connection(app, chat(stream=True))
    await asyncio.wait_for(connection.task, 5.0)
    bodies = [message["body"] for message in connection.sent if message.get("body")]
    assert bodies[0] == b": keep-alive\n\n"
    assert b"no replica is left" in bodies[-1]


async def test_a_refusal_after_the_comments_have_begun_is_an_error_to_openais_client(tokenizer: Tokenizer) -> None:
    scripted = ScriptedClient(tokenizer, "done", step_s=0.05)
    scripted.failure = (1, OverloadedError("overloaded: its turn did not come in time; try again in 7 s", 7))
    app = build_asgi_app(
        ModelRegistry([ServedModel("tiny", scripted, tokenizer, 512)]), HttpSettings(keep_alive_s=0.01)
    )
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    async with openai.AsyncOpenAI(http_client=http, base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="try again in 7 s") as failed:
            async for _ in stream:
                pass
    assert stream.response.status_code == 200
    assert failed.value.code == "overloaded"
    assert failed.value.type == "rate_limit_error"
    assert isinstance(failed.value.body, dict)
    assert failed.value.body["retry_after"] == 7


async def test_a_busy_ingress_sends_fewer_pieces_and_no_token_less(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def pieces(hold_s: float) -> list[bytes]:
        monkeypatch.setattr(Pacer, "hold_s", lambda _: hold_s)
        client = ScriptedClient(tokenizer, "word " * 60, step_s=0.002)
        app = build_asgi_app(ModelRegistry([ServedModel("tiny", Queued(client), tokenizer, 512)]))
        connection = Connection(app, chat(stream=True, max_tokens=60))
        await asyncio.wait_for(connection.task, 10.0)
        return [message["body"] for message in connection.sent if message.get("body")]

    at_once, held = await pieces(0.0), await pieces(0.05)
    assert text_of(held) == text_of(at_once) != ""
    assert len(held) < len(at_once) / 2


async def test_layers_see_how_a_stream_starts_and_none_of_its_events(tokenizer: Tokenizer) -> None:
    """Each layer that an event went through would cost every token."""
    model = ScriptedClient(tokenizer, "Paris.")
    app = build_asgi_app(ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)]))
    seen: list[str] = []

    class Layer:
        def __init__(self, inner: ASGIApp) -> None:
            self._inner = inner

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def watch(message: Message) -> None:
                seen.append(message["type"])
                await send(message)

            await self._inner(scope, receive, watch)

    app.add_middleware(Layer)
    connection = Connection(app, chat(model="tiny", stream=True))
    await connection.task
    sent = [message["type"] for message in connection.sent]
    assert sent == ["http.response.start", *["http.response.body"] * (len(sent) - 1)]
    assert len(sent) > 3
    assert seen == ["http.response.start"]
