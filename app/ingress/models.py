"""The models this ingress serves: name → client, tokenizer, limits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from app.ingress.client import ModelClient
from app.ingress.splits import WeightedSplit
from app.telemetry.model_samples import ModelTelemetry
from engine.errors import ConfigError, ModelNotFoundError, RequestError
from engine.tokenization import Tokenizer

Splits = Mapping[str, Mapping[str, float]]


def adapter_id(model_id: str, adapter: str) -> str:
    """How requests name an adapter of a model."""
    return f"{model_id}:{adapter}"


@dataclass(frozen=True)
class ServedModel:
    """One model of the configuration.

    Attributes:
        context_length: longest sequence in tokens as configuration and checkpoint say; holds until a replica has told
            what its engine was built with.
        created: Unix seconds, for `/v1/models`.
        adapters: names of its LoRA adapters; each is served as `id:adapter`.
        adapter: the adapter that requests of this entry are for; "" is the model itself.
        parent: an adapter's model.
    """

    id: str
    client: ModelClient
    tokenizer: Tokenizer
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: tuple[str, ...] = ()
    adapter: str = ""
    parent: str | None = None

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output."""
        return self.client.state().max_model_len or self.context_length

    def with_adapters(self) -> Iterator[ServedModel]:
        """The model, then each of its adapters as an entry of its own."""
        yield self
        for name in self.adapters:
            yield replace(self, id=adapter_id(self.id, name), adapters=(), adapter=name, parent=self.id)

    def telemetry(self) -> ModelTelemetry:
        """What `/metrics` says of it."""
        return self.client.telemetry()


class ListedName(NamedTuple):
    """A name that requests may use. `models` has one model, or those that a split's requests go to."""

    name: str
    models: tuple[ServedModel, ...]


class ModelRegistry:
    """Looks models up by the request's `model`: an id, `id:adapter`, an alias, or a split.

    All of it can change while it serves.

    A change replaces the tables as a whole; requests that run keep the model that they began with.
    """

    def __init__(
        self, models: Iterable[ServedModel], aliases: Mapping[str, str] | None = None, splits: Splits | None = None
    ) -> None:
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._splits: dict[str, WeightedSplit] = {}
        self.replace(models, aliases or {}, splits or {})

    def replace(self, models: Iterable[ServedModel], aliases: Mapping[str, str], splits: Splits) -> None:
        """Take over new tables: models, alias → model id, and split → model id → weight. An adapter counts as a model.

        Raises:
            ConfigError: a name is used twice or points to no model; the old tables stay.
        """
        table: dict[str, ServedModel] = {}
        for model in (entry for base in models for entry in base.with_adapters()):
            if table.setdefault(model.id, model) is not model:
                raise ConfigError(f"{model.id!r} is served twice")
        for kind, targets_of in (("alias", {alias: (target,) for alias, target in aliases.items()}), ("split", splits)):
            for name, targets in targets_of.items():
                if name in table:
                    raise ConfigError(f"{kind} {name!r} is the id of a model")
                if missing := [target for target in targets if target not in table]:
                    raise ConfigError(f"{kind} {name!r} points to {missing[0]!r}, which is not served")
        if both := aliases.keys() & splits.keys():
            raise ConfigError(f"{min(both)!r} is an alias and a split")
        # A split that has not changed keeps its turn.
        kept = {name: old for name, old in self._splits.items() if splits.get(name) == old.weights}
        self._models, self._aliases = table, dict(aliases)
        self._splits = {name: kept.get(name) or WeightedSplit(weights) for name, weights in splits.items()}

    def __iter__(self) -> Iterator[ServedModel]:
        """The models, without their adapters."""
        return (model for model in self._models.values() if not model.adapter)

    def names(self) -> list[ListedName]:
        """All names a request may use: ids first, then aliases, then splits."""
        ids = [ListedName(name, (model,)) for name, model in self._models.items()]
        aliases = [ListedName(alias, (self._models[target],)) for alias, target in self._aliases.items()]
        splits = [
            ListedName(name, tuple(self._models[target] for target in split.weights))
            for name, split in self._splits.items()
        ]
        return ids + aliases + splits

    def named(self, name: str) -> ListedName:
        """What a name stands for; ModelNotFoundError lists what is served."""
        for listed in self.names():
            if listed.name == name:
                return listed
        raise self._not_found(name)

    def get(self, name: str) -> ServedModel:
        """The model for the next request of a name; ModelNotFoundError lists what is served."""
        split = self._splits.get(name)
        target = self._aliases.get(name, name) if split is None else split.next()
        model = self._models.get(target)
        if model is None:
            raise self._not_found(name)
        return model

    def get_only(self, name: str | None) -> ServedModel:
        """As `get`, but the name may be left out where there is nothing to choose. Uses up no turn of a split."""
        if name is not None:
            return self.named(name).models[0]
        models = list(self)
        if len(models) != 1:
            raise RequestError("missing required parameter: model", param="model", code="missing_required_parameter")
        return models[0]

    def answer_name(self, name: str, model: ServedModel) -> str:
        """What a response says its `model` is: the requested name, but a split's says which version has answered."""
        return model.id if name in self._splits else name

    def _not_found(self, name: str) -> ModelNotFoundError:
        served = ", ".join(listed.name for listed in self.names())
        return ModelNotFoundError(
            f"the model {name!r} does not exist; served: {served}", param="model", code="model_not_found"
        )
