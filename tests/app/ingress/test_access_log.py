from __future__ import annotations

import logging

import httpx2
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.settings import HttpSettings
from engine.errors import OverloadedError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, http_client

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def accesses(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [line for line in caplog.records if line.name == "app.ingress.access_log"]


async def test_no_line_for_a_request_unless_asked(http: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
    assert [line for line in caplog.records if not line.name.startswith("httpx")] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_line_has_what_a_request_took(
    model: ScriptedClient, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)])
    async with http_client(build_asgi_app(registry, HttpSettings(access_log=True))) as http:
        assert (await http.post("/v1/chat/completions", json=chat(stream=stream, max_tokens=4))).status_code == 200
        assert (await http.get("/health")).status_code == 200
    (line,) = accesses(caplog)
    fields = line.__dict__
    assert (fields["endpoint"], fields["model"], fields["status"]) == ("chat", "tiny", 200)
    assert (fields["cached_tokens"], fields["output_tokens"]) == (3, 4)
    assert fields["prompt_tokens"] > 0
    assert 0 <= fields["time_to_first_token_s"] <= fields["duration_s"] < 5
    assert line.getMessage().startswith("chat tiny 200 in 0.")
    assert "(3 cached), 4 more, the first after" in line.getMessage()


async def test_a_request_that_fails_has_its_line(
    model: ScriptedClient, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)])
    model.refusal = OverloadedError("full")
    async with http_client(build_asgi_app(registry, HttpSettings(access_log=True))) as http:
        await http.post("/v1/chat/completions", json=chat())
        await http.post("/v1/completions", json={"model": "nobody", "prompt": "x"})
    refused, unknown = accesses(caplog)
    assert refused.getMessage().startswith("chat tiny 429 in ")
    assert unknown.getMessage().startswith("completions - 404 in ")
    assert "prompt_tokens" not in unknown.__dict__
