"""The small endpoints: models, tokens, health, version; API keys and request ids."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx2
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.auth import ApiKeys
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.settings import HttpSettings
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, http_client

pytestmark = pytest.mark.anyio


async def test_models_and_aliases_are_listed(http: httpx2.AsyncClient) -> None:
    body = (await http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [(item["id"], item["root"], item["object"]) for item in body["data"]] == [
        ("tiny", "tiny", "model"),
        ("small", "tiny", "model"),
    ]
    assert (await http.get("/v1/models/small")).json() == body["data"][1]
    assert body["data"][0]["max_model_len"] == 512


async def test_an_alias_answers_under_its_own_name(http: httpx2.AsyncClient) -> None:
    assert (await http.post("/v1/chat/completions", json=chat(model="small"))).json()["model"] == "small"


async def test_an_alias_and_a_split_are_counted_right_over_a_thousand_requests(tokenizer: Tokenizer) -> None:
    old, new = ScriptedClient(tokenizer, "old"), ScriptedClient(tokenizer, "new")
    models = [ServedModel("v1", old, tokenizer, 512), ServedModel("v2", new, tokenizer, 512)]
    registry = ModelRegistry(models, {"stable": "v1"}, {"chat": {"v1": 90, "v2": 10}})
    async with http_client(build_asgi_app(registry)) as client:

        async def ask(number: int) -> str:
            name = "stable" if number % 5 == 0 else "chat"
            response = await client.post("/v1/completions", json={"model": name, "prompt": [1], "max_tokens": 1})
            return f"{name} {response.json()['model']}"

        answered: Counter[str] = Counter()
        for begin in range(0, 1250, 50):
            answered.update(await asyncio.gather(*(ask(number) for number in range(begin, begin + 50))))
        assert answered == {"stable stable": 250, "chat v1": 900, "chat v2": 100}
        assert (len(old.requests), len(new.requests)) == (1150, 100)
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(item["id"], item["root"]) for item in listed] == [
            ("v1", "v1"),
            ("v2", "v2"),
            ("stable", "v1"),
            ("chat", "chat"),
        ]


async def test_once_it_serves_one_ready_model_keeps_the_ingress_up(tokenizer: Tokenizer) -> None:
    first, second = ScriptedClient(tokenizer, "x"), ScriptedClient(tokenizer, "x")
    second.ready = False
    registry = ModelRegistry([ServedModel("a", first, tokenizer, 512), ServedModel("b", second, tokenizer, 512)])
    async with http_client(build_asgi_app(registry)) as client:

        async def health() -> tuple[int, str]:
            response = await client.get("/health")
            return response.status_code, response.json()["status"]

        assert await health() == (503, "unavailable"), "a start is complete when all models are there"
        second.ready = True
        assert await health() == (200, "ok")
        second.ready = False
        assert await health() == (200, "degraded")
        first.ready = False
        assert await health() == (503, "unavailable")


async def test_the_checkpoints_limit_holds_until_a_replica_has_told_its_own(
    http: httpx2.AsyncClient, model: ScriptedClient
) -> None:
    model.max_model_len = None
    assert (await http.get("/v1/models/tiny")).json()["max_model_len"] == 2048


async def test_tokenize_and_back(http: httpx2.AsyncClient, tokenizer: Tokenizer) -> None:
    body = (await http.post("/tokenize", json={"prompt": "Hello 🙂", "return_token_strs": True})).json()
    assert body["tokens"] == tokenizer.encode("Hello 🙂")
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    back = await http.post("/detokenize", json={"model": "tiny", "tokens": body["tokens"]})
    assert back.json() == {"prompt": "Hello 🙂"}


async def test_tokenizing_messages_counts_what_a_chat_request_does(http: httpx2.AsyncClient) -> None:
    messages = chat()["messages"]
    body = (await http.post("/tokenize", json={"model": "small", "messages": messages})).json()
    usage = (await http.post("/v1/chat/completions", json=chat())).json()["usage"]
    assert body["count"] == usage["prompt_tokens"]
    longer = (await http.post("/tokenize", json={"messages": messages, "add_special_tokens": True})).json()
    assert longer["count"] >= body["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "x", "temperature": 1}, "temperature"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, "2"]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
async def test_bad_token_requests(http: httpx2.AsyncClient, path: str, body: object, param: str) -> None:
    response = await http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_a_long_text_is_tokenised_the_same_off_the_event_loop(
    http: httpx2.AsyncClient, tokenizer: Tokenizer
) -> None:
    text = "The quick brown fox. " * 1000
    body = (await http.post("/tokenize", json={"prompt": text})).json()
    assert body["tokens"] == tokenizer.encode(text)


async def test_health_follows_the_models(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    response = await http.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "models": [
            {
                "model_id": "scripted",
                "ready": True,
                "num_replicas": 1,
                "detail": "ready",
                "max_model_len": 512,
                "simulated": None,
            }
        ],
    }
    model.ready = False
    response = await http.get("/health")
    assert response.status_code == 503
    assert response.json()["models"][0]["detail"] == "starting"


async def test_version(http: httpx2.AsyncClient) -> None:
    assert (await http.get("/version")).json()["version"]


async def test_the_model_may_be_left_out_only_where_one_is_served(tokenizer: Tokenizer) -> None:
    models = [ServedModel(name, ScriptedClient(tokenizer, "x"), tokenizer, 512) for name in ("a", "b")]
    async with http_client(build_asgi_app(ModelRegistry(models))) as http:
        response = await http.post("/tokenize", json={"prompt": "x"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "model"


async def test_api_keys(model: ScriptedClient, tokenizer: Tokenizer) -> None:
    keys = ApiKeys(["one", "two"])
    app = build_asgi_app(ModelRegistry([ServedModel("tiny", model, tokenizer, 512)]), api_keys=keys)
    async with http_client(app) as http:
        for header in ({}, {"authorization": "one"}, {"authorization": "Basic one"}, {"authorization": "Bearer on"}):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/v1/models/tiny"),
                ("POST", "/v1/completions"),
                ("POST", "/v1/chat/completions"),
                ("POST", "/tokenize"),
                ("POST", "/detokenize"),
            ):
                response = await http.request(method, path, headers=header)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
        assert (await http.get("/health")).status_code == 200, "load balancers have no key"
        for key in ("one", "two"):
            header = {"authorization": f"Bearer {key}"}
            assert (await http.post("/v1/chat/completions", json=chat(), headers=header)).status_code == 200
        keys.replace(["three"])
        assert (await http.get("/v1/models", headers={"authorization": "Bearer one"})).status_code == 401
        keys.replace([])
        assert (await http.get("/v1/models")).status_code == 200


async def test_request_ids_are_echoed(http: httpx2.AsyncClient, model: ScriptedClient, tokenizer: Tokenizer) -> None:
    response = await http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert (await http.get("/nothing", headers={"x-request-id": "mine-2"})).headers["x-request-id"] == "mine-2"
    assert len((await http.get("/v1/models")).headers["x-request-id"]) == 32
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 512)])
    async with http_client(build_asgi_app(registry, HttpSettings(echo_request_id=False))) as bare:
        assert "x-request-id" not in (await bare.get("/v1/models")).headers


async def test_adapters_are_asked_for_and_listed_by_name(model: ScriptedClient, tokenizer: Tokenizer) -> None:
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 512, adapters=("sql",))])
    async with http_client(build_asgi_app(registry)) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [(item["id"], item["parent"]) for item in listed] == [("tiny", None), ("tiny:sql", "tiny")]
        assert (await http.get("/v1/models/tiny:sql")).json() == listed[1]
        for path, body in (("/v1/chat/completions", chat()), ("/v1/completions", {"prompt": "x", "max_tokens": 2})):
            for name, adapter in (("tiny:sql", "sql"), ("tiny", "")):
                response = await http.post(path, json={**body, "model": name})
                assert (response.status_code, response.json()["model"]) == (200, name)
                assert model.requests[-1].adapter == adapter
            response = await http.post(path, json={**body, "model": "tiny:other"})
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "model_not_found"
            assert response.json()["error"]["type"] == "invalid_request_error"
        assert len((await http.get("/health")).json()["models"]) == 1
