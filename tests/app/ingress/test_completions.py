"""POST /v1/completions: forms of prompts, echo, several prompts and choices, log-probabilities, streaming."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, events, http_client

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"
TEXT = "Paris is the capital of France."


async def ask(http: httpx2.AsyncClient, prompt: Any, **parameters: Any) -> dict[str, Any]:
    response = await http.post(PATH, json={"model": "tiny", "prompt": prompt, **parameters})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def stream(http: httpx2.AsyncClient, prompt: Any, **parameters: Any) -> list[dict[str, Any]]:
    response = await http.post(PATH, json={"model": "tiny", "prompt": prompt, "stream": True, **parameters})
    assert response.status_code == 200, response.text
    data = events(response.text)
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["text"]
    return joined


async def test_the_whole_object(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await ask(http, "hello")
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    num_output = len(tokenizer.encode(TEXT)) + 1
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode("hello"))
    assert body["usage"]["completion_tokens"] == num_output


async def test_the_default_length_is_16_or_what_fits(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    await ask(http, "hello")
    await ask(http, [1] * 510)
    assert [request.sampling_params.max_tokens for request in model.requests] == [16, 2]


@pytest.mark.parametrize(
    ("prompt", "count"), [("a b", 1), (["a b", "c"], 2), ([1, 2, 3], 1), ([[1, 2], [3], [4]], 3), (["a"], 1)]
)
async def test_forms_of_prompts(
    http: httpx2.AsyncClient, model: ScriptedClient, tokenizer: Tokenizer, prompt: Any, count: int
) -> None:
    body = await ask(http, prompt)
    assert [choice["text"] for choice in body["choices"]] == [TEXT] * count
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [tokenizer.encode(item) if isinstance(item, str) else item for item in prompts]
    assert [list(request.prompt_token_ids) for request in model.requests] == ids
    assert len({request.request_id for request in model.requests}) == count
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * count


async def test_prompts_times_choices(http: httpx2.AsyncClient) -> None:
    body = await ask(http, ["a", "b"], n=2, echo=True)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "a" + TEXT), (1, "a" + TEXT), (2, "b" + TEXT), (3, "b" + TEXT)
    ]  # fmt: skip
    chunks = await stream(http, ["a", "b"], n=2, echo=True, stream_options={"include_usage": True})
    assert texts(chunks) == {0: "a" + TEXT, 1: "a" + TEXT, 2: "b" + TEXT, 3: "b" + TEXT}
    assert chunks[-1]["usage"] == body["usage"]


async def test_echo_of_token_ids(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    body = await ask(http, tokenizer.encode("Once upon"), echo=True)
    assert body["choices"][0]["text"] == "Once upon" + TEXT


async def test_a_stream_equals_the_whole(http: httpx2.AsyncClient) -> None:
    chunks = await stream(http, "hello", stop="capital")
    assert texts(chunks) == {0: "Paris is the "}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


async def test_logprobs(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    logprobs = (await ask(http, "hello", logprobs=2))["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == TEXT
    count = len(logprobs["tokens"])
    assert logprobs["token_logprobs"] == [-float(i) for i in range(count)]
    offset = 0
    for token, start in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert start == offset
        offset += len(token)
    likely = {tokenizer.token_text(1), tokenizer.token_text(2)}
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert set(top) == likely | {token}, "the drawn token is always there"
    streamed = [chunk["choices"][0]["logprobs"] for chunk in await stream(http, "hello", logprobs=2)]
    for name in logprobs:
        assert [item for part in streamed if part for item in part[name]] == logprobs[name]


async def test_zero_logprobs_report_the_drawn_tokens(http: httpx2.AsyncClient) -> None:
    logprobs = (await ask(http, "hello", logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"] is None
    assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) > 0


async def test_token_ids_can_be_returned(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    expected = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    choice = (await ask(http, [5, 6], return_token_ids=True))["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6]
    assert choice["token_ids"] == expected
    chunks = await stream(http, [5, 6], return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert [id_ for chunk in chunks for id_ in chunk["choices"][0]["token_ids"]] == expected


async def test_unseeded_prompts_draw_differently(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    await ask(http, ["a", "a"])
    first, second = model.requests
    assert first.sampling_params.seed != second.sampling_params.seed


async def test_a_choice_that_meets_its_stop_string_is_stopped_on_the_engine(tokenizer: Tokenizer) -> None:
    scripted = ScriptedClient(tokenizer, "one two three four five six", "seven eight")
    registry = ModelRegistry([ServedModel("tiny", scripted, tokenizer, 2048)])
    async with http_client(build_asgi_app(registry)) as http:
        body = {"model": "tiny", "prompt": "a", "n": 2, "stop": " two", "max_tokens": 32}
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert [choice["text"] for choice in choices] == ["one", "seven eight"]
    assert [choice["stop_reason"] for choice in choices] == [" two", None]
    # Told once, and of the one that the engine would have gone on with.
    assert scripted.stopped == [(scripted.requests[0].request_id, 0)]
