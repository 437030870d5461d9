"""What a Serve config's `args` may say: which models, how each is deployed, and how HTTP is served.

All are frozen and checked where they are made; unknown keys are errors that list the known ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.config import EngineConfig
from engine.errors import ConfigError

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


class Args(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RayActorOptions(Args):
    """What one replica takes of its node. CPUs are Ray's bookkeeping, not a limit on threads.

    `memory` is in bytes; `runtime_env` goes to Ray as it stands.
    """

    num_cpus: float = Field(default=0.5, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    memory: int | None = Field(default=None, ge=1)
    resources: dict[str, float] | None = None
    accelerator_type: str | None = None
    runtime_env: dict[str, Any] | None = None


class DeploymentArgs(Args):
    """How Serve runs the replicas of one deployment. Times are in seconds.

    Attributes:
        max_ongoing_requests: requests a replica may have open; None lets the builder derive it from the engine's own
            bound, which it must exceed.
        graceful_shutdown_timeout_s: how long a replica that is to stop may finish its requests.
        health_check_period_s: also how long a dead replica stays unnoticed.
        max_constructor_retry_count: replicas that may fail to start before the deployment counts as failed.
    """

    num_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    graceful_shutdown_wait_loop_s: float = Field(default=0.2, gt=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    health_check_period_s: float = Field(default=2.0, gt=0)
    health_check_timeout_s: float = Field(default=30.0, gt=0)
    max_constructor_retry_count: int = Field(default=2, ge=1)
    ray_actor_options: RayActorOptions = RayActorOptions()


class ModelArgs(Args):
    """One model.

    Attributes:
        id: the `model` that requests name.
        source: where its weights are: a folder, `package:NAME`, `dummy:NAME`.
        engine: engine options, checked with EngineConfig.
        aliases: further names that requests may use.
    """

    id: str
    source: str = Field(min_length=1)
    engine: dict[str, Any] = Field(default_factory=dict)
    deployment: DeploymentArgs = DeploymentArgs()
    aliases: list[str] = Field(default_factory=list)

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        return _name(value)

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, value: list[str]) -> list[str]:
        return [_name(alias) for alias in value]

    @field_validator("engine")
    @classmethod
    def _check_engine(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            EngineConfig.from_dict(value)
        except ConfigError as error:
            # ValueError is how pydantic takes an error in, and adds where it happened.
            raise ValueError(str(error)) from None
        return value

    @property
    def engine_config(self) -> EngineConfig:
        """The engine options as the engine takes them."""
        return EngineConfig.from_dict(self.engine)


class IngressArgs(Args):
    """The HTTP deployment.

    Attributes:
        max_ongoing_requests: requests an ingress replica may have open; each open stream is one.
        max_body_bytes: longest request body that is read; a longer one is answered with 413.
        api_keys: keys that requests must bring; empty lets everyone in. The environment variable QUIRE_API_KEYS, comma
            separated, adds to them without being written into a config.
    """

    num_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=2048, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    api_keys: list[str] = Field(default_factory=list)
    graceful_shutdown_wait_loop_s: float = Field(default=0.2, gt=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    health_check_period_s: float = Field(default=2.0, gt=0)
    health_check_timeout_s: float = Field(default=30.0, gt=0)
    ray_actor_options: RayActorOptions = RayActorOptions(num_cpus=0.1)

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: list[str]) -> list[str]:
        if not all(key.strip() == key and key for key in value):
            raise ValueError("keys must not be empty nor begin or end with spaces")
        return value


class IngressUserConfig(Args):
    """What an ingress takes over while it serves: Serve's `user_config`, the deployment is not restarted for it."""

    aliases: dict[str, str] = Field(default_factory=dict)
    api_keys: list[str] = Field(default_factory=list)


class AppArgs(Args):
    """`args` of one application."""

    models: list[ModelArgs] = Field(min_length=1)
    ingress: IngressArgs = IngressArgs()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        seen: set[str] = set()
        for name in self._names():
            if name in seen:
                raise ValueError(f"the model name {name!r} is given twice (ids and aliases share one name space)")
            seen.add(name)
        return self

    def _names(self) -> Iterator[str]:
        for model in self.models:
            yield model.id
            yield from model.aliases

    @property
    def aliases(self) -> dict[str, str]:
        """Alias → model id, of all models."""
        return {alias: model.id for model in self.models for alias in model.aliases}

    @classmethod
    def from_dict(cls, args: Any) -> AppArgs:
        """Validate a config's `args`; ConfigError says in one line what is wrong and where."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(describe(error, "args")) from None


def describe(error: ValidationError, root: str) -> str:
    """The first of pydantic's complaints in one line: `args.models[0].id: ...`."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{where}: {message}" + (f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else "")


def _name(value: str) -> str:
    if not _MODEL_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} must begin with a letter or digit and hold only letters, digits and . _ : / - (128 at most)"
        )
    return value
