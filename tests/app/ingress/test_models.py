"""ModelRegistry: ids, aliases, splits, and what cannot be."""

from __future__ import annotations

from collections import Counter

import pytest

from app.ingress.models import ModelRegistry, ServedModel
from engine.errors import ConfigError, ModelNotFoundError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient


@pytest.fixture
def registry(tokenizer: Tokenizer) -> ModelRegistry:
    models = [ServedModel(name, ScriptedClient(tokenizer, "x"), tokenizer, 512) for name in ("a", "b")]
    return ModelRegistry(models, {"one": "a"})


def test_models_are_found_by_id_and_alias(registry: ModelRegistry) -> None:
    assert registry.get("b").id == "b"
    assert registry.get("one").id == "a"
    assert [listed.name for listed in registry.names()] == ["a", "b", "one"]


def test_new_aliases_replace_the_old(registry: ModelRegistry) -> None:
    registry.replace(registry, {"two": "b"}, {})
    assert registry.get("two").id == "b"
    with pytest.raises(ModelNotFoundError, match="served: a, b, two"):
        registry.get("one")


@pytest.mark.parametrize(
    ("aliases", "splits", "why"),
    [
        ({"a": "b"}, {}, "alias 'a' is the id of a model"),
        ({"c": "d"}, {}, "alias 'c' points to 'd', which is not served"),
        ({}, {"a": {"b": 1.0}}, "split 'a' is the id of a model"),
        ({}, {"s": {"a": 1.0, "d": 1.0}}, "split 's' points to 'd', which is not served"),
        ({"s": "a"}, {"s": {"a": 1.0}}, "'s' is an alias and a split"),
    ],
)
def test_wrong_names_leave_the_old_in_place(
    registry: ModelRegistry, aliases: dict[str, str], splits: dict[str, dict[str, float]], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        registry.replace(registry, aliases, splits)
    assert registry.get("one").id == "a"


def test_a_split_shares_requests_out_and_goes_on_where_it_was(registry: ModelRegistry) -> None:
    splits = {"s": {"a": 3.0, "b": 1.0}}
    registry.replace(registry, {}, splits)
    first = [registry.get("s").id for _ in range(6)]
    registry.replace(registry, {"new": "a"}, splits)
    assert Counter(first + [registry.get("s").id for _ in range(2)]) == {"a": 6, "b": 2}, "its turn was lost"
    assert [model.id for model in registry.named("s").models] == ["a", "b"]


def test_a_split_says_which_version_answers_and_an_alias_does_not(registry: ModelRegistry) -> None:
    registry.replace(registry, {"one": "a"}, {"s": {"b": 1.0}})
    assert registry.answer_name("s", registry.get("s")) == "b"
    assert registry.answer_name("one", registry.get("one")) == "one"


def test_looking_a_split_up_uses_no_turn(registry: ModelRegistry) -> None:
    registry.replace(registry, {}, {"s": {"a": 1.0, "b": 1.0}})
    for _ in range(3):
        registry.get_only("s")
    assert [registry.get("s").id for _ in range(4)] == ["a", "b", "a", "b"]


def test_adapters_are_models_with_a_parent(tokenizer: Tokenizer) -> None:
    base = ServedModel("a", ScriptedClient(tokenizer, "x"), tokenizer, 512, adapters=("sql", "chat"))
    registry = ModelRegistry([base], {"one": "a:sql"}, {"s": {"a": 1.0, "a:chat": 1.0}})
    assert [listed.name for listed in registry.names()] == ["a", "a:sql", "a:chat", "one", "s"]
    assert [model.id for model in registry] == ["a"], "it is one model, and one client"
    found = registry.get("one")
    assert (found.id, found.adapter, found.parent, found.client) == ("a:sql", "sql", "a", base.client)
    assert registry.get_only(None) is base
    assert {registry.get("s").adapter for _ in range(2)} == {"", "chat"}
    with pytest.raises(ModelNotFoundError, match="the model 'a:other' does not exist; served: a, a:sql, a:chat"):
        registry.get("a:other")
    other = ServedModel("a:sql", ScriptedClient(tokenizer, "x"), tokenizer, 512)
    with pytest.raises(ConfigError, match="'a:sql' is served twice"):
        registry.replace([base, other], {}, {})
