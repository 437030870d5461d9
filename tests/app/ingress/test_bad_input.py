"""Every bad request gets an OpenAI error that names the parameter, and the next good one is answered."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from engine.errors import EngineDeadError, OverloadedError, RequestError
from tests.app.ingress.doubles import ScriptedClient, chat

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def completion(prompt: Any = "hello", **parameters: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": prompt, **parameters}


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) - {"retry_after"} == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    # Streams that are refused late have no header any more.
    assert str(body["error"].get("retry_after")) == response.headers.get("retry-after", "None")
    return dict(body["error"])


async def assert_still_serves(http: httpx2.AsyncClient) -> None:
    response = await http.post(CHAT, json=chat())
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "Paris is the capital of France."


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"seed": -(1 << 64)}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages[0].mood"),
        ({"model": 5}, "model"),
        ({"temprature": 1}, "temprature"),
    ],
)
async def test_a_wrong_chat_parameter_is_named(
    http: httpx2.AsyncClient, model: ScriptedClient, change: dict[str, Any], param: str
) -> None:
    body = json.dumps(chat() | change)
    error = error_of(await http.post(CHAT, content=body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2].partition("[")[0] in error["message"]
    assert not model.requests
    await assert_still_serves(http)


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"parallel_tool_calls": False},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "high"},
        {"verbosity": "low"},
        {"web_search_options": {}},
        {"store": True},
        {"service_tier": "priority"},
    ],
)
async def test_an_unsupported_chat_parameter_is_refused(http: httpx2.AsyncClient, change: dict[str, Any]) -> None:
    error = error_of(await http.post(CHAT, json=chat(**change)), 400)
    assert error["param"] == next(iter(change))
    assert error["code"] == "unsupported_parameter"
    assert "not supported" in error["message"]
    await assert_still_serves(http)


async def test_content_that_is_no_text_is_refused(http: httpx2.AsyncClient) -> None:
    image = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    error = error_of(await http.post(CHAT, json=chat(messages=[{"role": "user", "content": image}])), 400)
    assert error["param"] == "messages[0].content"
    assert "'image_url', which is not supported" in error["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"best_of": 1},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"store": False},
        {"service_tier": "auto"},
        {"metadata": {"a": "b"}},
        {"user": "me"},
        {"temperature": None, "n": None, "stop": None, "seed": None, "max_tokens": None, "logit_bias": None},
        {"stream": None, "stream_options": None, "logprobs": None, "top_logprobs": None},
        {"logprobs": False, "top_logprobs": 0},
    ],
)
async def test_values_that_change_nothing_are_accepted(http: httpx2.AsyncClient, change: dict[str, Any]) -> None:
    response = await http.post(CHAT, json=chat(**change))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1 << 40]}, "prompt"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 2, "stream": True}, "stream"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"length_penalty": 0.5}, "length_penalty"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": "yes"}, "echo"),
        ({"messages": []}, "messages"),
        ({"tools": None}, "tools"),
    ],
)
async def test_a_wrong_completion_parameter_is_named(
    http: httpx2.AsyncClient, model: ScriptedClient, change: dict[str, Any], param: str
) -> None:
    error = error_of(await http.post(COMPLETIONS, json=completion() | change), 400)
    assert error["param"] == param
    assert not model.requests
    await assert_still_serves(http)


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_a_missing_parameter_is_named(http: httpx2.AsyncClient, missing: str) -> None:
    body = chat()
    del body[missing]
    error = error_of(await http.post(CHAT, json=body), 400)
    assert error["param"] == missing
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "tiny",}', b"[" * 100_000, b'{"model": "\\ud800"}'],
    ids=repr,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_malformed_json(http: httpx2.AsyncClient, path: str, body: bytes) -> None:
    error = error_of(await http.post(path, content=body), 400)
    assert error["code"] == "invalid_json"
    await assert_still_serves(http)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_over_long_prompt_tells_its_length_and_the_limit(http: httpx2.AsyncClient, stream: bool) -> None:
    error = error_of(await http.post(CHAT, json=chat("word " * 600, stream=stream)), 400)
    assert error["param"] == "messages"
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "631" in error["message"]
    error = error_of(await http.post(COMPLETIONS, json=completion([1] * 512, stream=stream)), 400)
    assert error["param"] == "prompt"
    await assert_still_serves(http)


async def test_prompt_and_output_together_are_bounded(http: httpx2.AsyncClient) -> None:
    assert (await http.post(COMPLETIONS, json=completion([1] * 500, max_tokens=12))).status_code == 200
    error = error_of(await http.post(COMPLETIONS, json=completion([1] * 500, max_tokens=13)), 400)
    assert error["param"] == "max_tokens"
    assert "513" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_an_unknown_model_is_not_found(http: httpx2.AsyncClient, path: str) -> None:
    bodies = {
        CHAT: chat(model="gpt-7"),
        COMPLETIONS: completion(model="gpt-7"),
        "/tokenize": {"model": "gpt-7", "prompt": "x"},
        "/detokenize": {"model": "gpt-7", "tokens": [1]},
    }
    error = error_of(await http.post(path, json=bodies[path]), 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "gpt-7" in error["message"]
    assert "tiny" in error["message"]


@pytest.mark.parametrize(
    ("change", "status"), [({"model": "x" * 100_000}, 404), ({"y" * 100_000: 1}, 400), ({"stop": "z" * 100_000}, 400)]
)
async def test_an_error_does_not_send_back_all_that_it_is_about(
    http: httpx2.AsyncClient, change: dict[str, Any], status: int
) -> None:
    response = await http.post(CHAT, json=chat(**change))
    error_of(response, status)
    assert len(response.content) < 5_000
    await assert_still_serves(http)


async def test_unknown_paths_and_methods(http: httpx2.AsyncClient) -> None:
    error_of(await http.get("/v1/nothing"), 404)
    error_of(await http.get("/"), 404)
    error_of(await http.get("/v1/models/gpt-7"), 404)
    response = await http.get(CHAT)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(await http.post("/v1/models"), 405)
    await assert_still_serves(http)


async def test_a_body_over_the_bound_is_refused_unread(http: httpx2.AsyncClient) -> None:
    error = error_of(await http.post(CHAT, json=chat("x" * (1 << 20))), 413)
    assert "1048576" in error["message"]

    async def endless() -> Any:
        while True:
            yield b"x" * 65536

    error_of(await http.post(CHAT, content=endless()), 413)
    await assert_still_serves(http)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (RequestError("n=3 does not fit", param="n"), 400, "invalid_request_error"),
        (OverloadedError("too much waits", retry_after_s=7), 429, "rate_limit_error"),
        (EngineDeadError("no replica is left"), 503, "service_unavailable_error"),
    ],
)
async def test_a_replicas_refusal_has_its_own_status(
    http: httpx2.AsyncClient, model: ScriptedClient, refusal: Any, status: int, kind: str, stream: bool
) -> None:
    model.refusal = refusal
    response = await http.post(CHAT, json=chat(stream=stream))
    error = error_of(response, status)
    assert error["type"] == kind
    assert error["message"] == str(refusal)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)
    model.refusal = None
    await assert_still_serves(http)


async def test_an_unforeseen_error_tells_nothing_of_the_inside(
    http: httpx2.AsyncClient, model: ScriptedClient, caplog: pytest.LogCaptureFixture
) -> None:
    model.failure = (0, KeyError("secret"))
    error = error_of(await http.post(CHAT, json=chat()), 500)
    assert "secret" not in error["message"]
    assert "secret" in caplog.text
    model.failure = None
    await assert_still_serves(http)


async def test_chat_with_a_model_without_a_template(
    http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(tokenizer, "_chat_template", None)
    error = error_of(await http.post(CHAT, json=chat()), 400)
    assert error["code"] == "no_chat_template"
    assert error["param"] == "messages"
    assert (await http.post(COMPLETIONS, json=completion())).status_code == 200
