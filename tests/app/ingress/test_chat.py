"""POST /v1/chat/completions: shapes, streaming, stop strings, log-probabilities, several choices, usage."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from engine.errors import EngineDeadError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, events, http_client

pytestmark = pytest.mark.anyio

PATH = "/v1/chat/completions"
TEXT = "Paris is the capital of France."


async def ask(http: httpx2.AsyncClient, **parameters: Any) -> dict[str, Any]:
    response = await http.post(PATH, json=chat(**parameters))
    assert response.status_code == 200, response.text
    return dict(response.json())


async def stream(http: httpx2.AsyncClient, **parameters: Any) -> list[dict[str, Any]]:
    response = await http.post(PATH, json=chat(stream=True, **parameters))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = events(response.text)
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


def texts(chunks: list[dict[str, Any]]) -> dict[int, str]:
    joined: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] = joined.get(choice["index"], "") + choice["delta"].get("content", "")
    return joined


async def test_the_whole_object(http: httpx2.AsyncClient, model: ScriptedClient, tokenizer: Tokenizer) -> None:
    body = await ask(http)
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": TEXT, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
    num_prompt, num_output = len(tokenizer.encode(prompt, False)), len(tokenizer.encode(TEXT)) + 1
    assert model.requests[0].prompt_token_ids == tokenizer.encode(prompt, False)
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_a_stream_is_shaped_as_openais(http: httpx2.AsyncClient) -> None:
    chunks = await stream(http)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert texts(chunks) == {0: TEXT}


async def test_usage_comes_last_and_only_when_asked_for(http: httpx2.AsyncClient) -> None:
    chunks = await stream(http, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == (await ask(http))["usage"]


async def test_continuous_usage_grows(http: httpx2.AsyncClient) -> None:
    chunks = await stream(http, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == (await ask(http))["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("capital", "Paris is the ", "capital"),
        ("s is t", "Pari", "s is t"),  # begins and ends inside tokens
        (["nowhere", "of F"], "Paris is the capital ", "of F"),
        ("Paris", "", "Paris"),
        ("France.", "Paris is the capital of ", "France."),
        ("France!", TEXT, None),  # held back to the very end, then released
        ("France.!", TEXT, None),
    ],
)
async def test_stop_strings(
    http: httpx2.AsyncClient, model: ScriptedClient, stop: Any, text: str, reason: str | None
) -> None:
    choice = (await ask(http, stop=stop))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", reason)
    assert model.closed == (reason is not None), "the rest of it must be aborted"
    chunks = await stream(http, stop=stop)
    assert texts(chunks) == {0: text}
    assert chunks[-1]["choices"][0]["stop_reason"] == reason


async def test_a_stop_string_can_be_kept(http: httpx2.AsyncClient) -> None:
    choice = (await ask(http, stop="capital", include_stop_str_in_output=True))["choices"][0]
    assert choice["message"]["content"] == "Paris is the capital"


async def test_a_stop_string_does_not_count_before_min_tokens(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    num_tokens = len(tokenizer.encode("Paris is the capital"))
    choice = (await ask(http, stop=["is", "of"], min_tokens=num_tokens + 1))["choices"][0]
    assert choice["message"]["content"] == "Paris is the capital "


async def test_tokens_after_a_stop_string_are_not_counted(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    usage = (await ask(http, stop=" the"))["usage"]
    assert usage["completion_tokens"] == len(tokenizer.encode("Paris is the"))


@pytest.mark.parametrize("text", ["naïve 🙂 日本語 ok", "👩‍👩‍👧‍👦", '\x00\x7f\u2028"\\/\n'])
async def test_characters_of_several_tokens_come_whole(tokenizer: Tokenizer, text: str) -> None:
    registry = ModelRegistry([ServedModel("tiny", ScriptedClient(tokenizer, text), tokenizer, 512)])
    async with http_client(build_asgi_app(registry)) as http:
        chunks = await stream(http)
        assert texts(chunks) == {0: text}
        assert "\ufffd" not in "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert (await ask(http))["choices"][0]["message"]["content"] == text


async def test_a_character_cut_off_by_max_tokens_is_shown_as_cut(tokenizer: Tokenizer) -> None:
    registry = ModelRegistry([ServedModel("tiny", ScriptedClient(tokenizer, "🙂"), tokenizer, 512)])
    async with http_client(build_asgi_app(registry)) as http:
        choice = (await ask(http, max_tokens=1))["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == "\ufffd"
        assert texts(await stream(http, max_tokens=1)) == {0: "\ufffd"}


async def test_logprobs(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    content = (await ask(http, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in content) == TEXT, "without the end-of-sequence token"
    assert [token["logprob"] for token in content] == [-float(i) for i in range(len(content))]
    for token in content:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert [top["token"] for top in token["top_logprobs"]] == [tokenizer.token_text(1), tokenizer.token_text(2)]
    content = (await ask(http, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in content)


async def test_streamed_logprobs_are_those_of_the_text(http: httpx2.AsyncClient) -> None:
    for parameters in ({}, {"stop": "capital"}, {"stop": "l of"}, {"max_tokens": 3}):
        chunks = await stream(http, logprobs=True, **parameters)
        streamed = [
            token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        whole = (await ask(http, logprobs=True, **parameters))["choices"][0]
        assert streamed == whole["logprobs"]["content"]
        assert "".join(token["token"] for token in streamed).startswith(whole["message"]["content"])


async def test_several_choices_are_told_apart(tokenizer: Tokenizer) -> None:
    scripts = ("one two three four five six", "uno", "a b stop c")
    client = ScriptedClient(tokenizer, *scripts)
    async with http_client(build_asgi_app(ModelRegistry([ServedModel("tiny", client, tokenizer, 512)]))) as http:
        parameters = {"n": 3, "stop": " stop", "max_tokens": 6}
        body = await ask(http, **parameters)
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert [choice["message"]["content"] for choice in body["choices"]] == [scripts[0], "uno", "a b"]
        assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop", "stop"]
        chunks = await stream(http, **parameters)
        assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2], "each begins with its role"
        assert texts(chunks) == {0: scripts[0], 1: "uno", 2: "a b"}
        for index in range(3):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert [choice["finish_reason"] is not None for choice in own] == [False] * (len(own) - 1) + [True]
        order = [chunk["choices"][0]["index"] for chunk in chunks[3:]]
        assert order != sorted(order), "interleaved, not one after the other"


async def test_token_ids_can_be_returned(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    expected = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    body = await ask(http, return_token_ids=True)
    assert body["choices"][0]["token_ids"] == expected
    chunks = await stream(http, return_token_ids=True)
    assert [id_ for chunk in chunks for id_ in chunk["choices"][0].get("token_ids", [])] == expected
    assert chunks[0]["choices"][0]["prompt_token_ids"] == body["prompt_token_ids"]


async def test_sampling_parameters_reach_the_engine(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    await ask(
        http, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2,
        frequency_penalty=0.3, logit_bias={"5": 2}, seed=11, stop=["a~"], stop_token_ids=[9], ignore_eos=True,
        min_tokens=1, max_completion_tokens=4, skip_special_tokens=False, cache_salt="me", n=2,
    )  # fmt: skip
    request = model.requests[0]
    params = request.sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (dict(params.logit_bias), params.seed, params.stop, params.stop_token_ids) == ({5: 2.0}, 11, ("a~",), (9,))
    assert (params.ignore_eos, params.min_tokens, params.max_tokens, params.n) == (True, 1, 4, 2)
    assert params.skip_special_tokens is False
    assert request.cache_salt == "me"


async def test_defaults(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    await ask(http)
    await ask(http, temperature=0)
    await ask(http, seed=-1)
    first, greedy, negative = model.requests
    assert first.sampling_params.temperature == 1.0
    assert first.sampling_params.max_tokens == 512 - len(first.prompt_token_ids), "what fits"
    assert first.sampling_params.seed is not None, "so that another replica continues the same"
    assert greedy.sampling_params.seed is None
    assert negative.sampling_params.seed == (1 << 64) - 1


async def test_template_parameters(http: httpx2.AsyncClient, model: ScriptedClient, tokenizer: Tokenizer) -> None:
    await ask(http, add_generation_prompt=False)
    expected = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=False)
    assert tokenizer.decode(list(model.requests[0].prompt_token_ids), skip_special_tokens=False) == expected
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    await ask(http, messages=[{"role": "user", "content": parts}], add_generation_prompt=False)
    assert model.requests[1].prompt_token_ids == model.requests[0].prompt_token_ids


async def test_an_error_after_the_stream_began_is_its_last_event(
    http: httpx2.AsyncClient, model: ScriptedClient
) -> None:
    model.failure = (3, EngineDeadError("no replica is left"))
    response = await http.post(PATH, json=chat(stream=True))
    assert response.status_code == 200
    data = [json.loads(item) for item in events(response.text)]
    assert data[-1]["error"]["message"] == "no replica is left"
    assert data[-1]["error"]["type"] == "service_unavailable_error"
    assert all("choices" in item for item in data[:-1])
