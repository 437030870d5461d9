"""ModelRegistry: names, aliases, and what cannot be."""

from __future__ import annotations

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
    assert [name for name, _ in registry.names()] == ["a", "b", "one"]


def test_new_aliases_replace_the_old(registry: ModelRegistry) -> None:
    registry.set_aliases({"two": "b"})
    assert registry.get("two").id == "b"
    with pytest.raises(ModelNotFoundError, match="served: a, b, two"):
        registry.get("one")


@pytest.mark.parametrize(("aliases", "why"), [({"a": "b"}, "is the id of a model"), ({"c": "d"}, "is not served")])
def test_wrong_aliases_leave_the_old_in_place(registry: ModelRegistry, aliases: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        registry.set_aliases(aliases)
    assert registry.get("one").id == "a"
