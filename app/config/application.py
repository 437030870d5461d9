"""An application's arguments, as the three builders take them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from pydantic import Field, field_validator, model_validator

from app.config.args import Args
from app.config.ingress import IngressArgs
from app.config.model import ModelArgs
from app.config.names import check_splits


class AppArgs(Args):
    """`args` of one application: models, and the ingress before them.

    `splits` are as in IngressUserConfig.
    """

    models: list[ModelArgs] = Field(min_length=1)
    ingress: IngressArgs = IngressArgs()
    splits: dict[str, dict[str, float]] = Field(default_factory=dict)

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return check_splits(value)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        ids = {name for model in self.models for name in model.served_ids}
        for name, targets in self.splits.items():
            if missing := targets.keys() - ids:
                raise ValueError(f"splits.{name}: {min(missing)!r} is not the id of a model")
        seen: set[str] = set()
        for name in self._names():
            if name in seen:
                raise ValueError(f"the model name {name!r} is given twice (ids, aliases and splits share a name space)")
            seen.add(name)
        return self

    def _names(self) -> Iterator[str]:
        for model in self.models:
            yield from model.served_ids
            yield from model.aliases
        yield from self.splits

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → model id, of all models."""
        return {alias: model.id for model in self.models for alias in model.aliases}


class ModelAppArgs(Args):
    """`args` of an application that is one model, for an ingress of another application."""

    model: ModelArgs

    @property
    def models(self) -> list[ModelArgs]:
        """The one."""
        return [self.model]

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.model.aliases:
            raise ValueError("model.aliases: give them in the user_config of the ingress, which knows all names")
        return self


class IngressAppArgs(Args):
    """`args` of an application that is an ingress alone: its models are in its `user_config`."""

    ingress: IngressArgs = IngressArgs()

    @property
    def models(self) -> list[ModelArgs]:
        """None of its own."""
        return []
