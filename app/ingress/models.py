"""The models this ingress serves: name → client, tokenizer, limits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from app.ingress.client import ModelClient
from engine.errors import ConfigError, ModelNotFoundError, RequestError
from engine.tokenization import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """One model of the configuration.

    Attributes:
        context_length: longest sequence in tokens as configuration and checkpoint say; holds until a replica has told
            what its engine was built with.
        created: Unix seconds, for `/v1/models`.
    """

    id: str
    client: ModelClient
    tokenizer: Tokenizer
    context_length: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output."""
        return self.client.state().max_model_len or self.context_length


class ModelRegistry:
    """Looks models up by the request's `model`. Aliases can change while it serves."""

    def __init__(self, models: Iterable[ServedModel], aliases: Mapping[str, str] | None = None) -> None:
        self._models = {model.id: model for model in models}
        self._aliases: dict[str, str] = {}
        self.set_aliases(aliases or {})

    def set_aliases(self, aliases: Mapping[str, str]) -> None:
        """Replace all aliases (alias → model id); ConfigError if one hides a model or points nowhere."""
        for alias, target in aliases.items():
            if alias in self._models:
                raise ConfigError(f"alias {alias!r} is the id of a model")
            if target not in self._models:
                raise ConfigError(f"alias {alias!r} points to {target!r}, which is not served")
        self._aliases = dict(aliases)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def names(self) -> list[tuple[str, ServedModel]]:
        """All names a request may use, with the model behind each: ids first, then aliases."""
        aliases = [(alias, self._models[target]) for alias, target in self._aliases.items()]
        return [*self._models.items(), *aliases]

    def get(self, name: str) -> ServedModel:
        """The model behind a name; ModelNotFoundError lists what is served."""
        model = self._models.get(self._aliases.get(name, name))
        if model is None:
            served = ", ".join(known for known, _ in self.names())
            raise ModelNotFoundError(
                f"the model {name!r} does not exist; served: {served}", param="model", code="model_not_found"
            )
        return model

    def get_only(self, name: str | None) -> ServedModel:
        """As `get`, but the name may be left out where there is nothing to choose."""
        if name is not None:
            return self.get(name)
        if len(self._models) != 1:
            raise RequestError("missing required parameter: model", param="model", code="missing_required_parameter")
        return next(iter(self._models.values()))
