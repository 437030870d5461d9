"""How HTTP is served, and what may change while it is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from app.config.args import AGENT_METRICS_S, Args
from app.config.deployment import RayActorOptions
from app.config.model import RemoteModel
from app.config.names import check_name, check_splits
from app.config.routing import AdmissionArgs
from app.config.usage import UsageArgs

Proxy = Literal["serve", "haproxy"]


class IngressArgs(Args):
    """The HTTP deployment.

    Attributes:
        max_ongoing_requests: requests an ingress replica may have open; each open stream is one.
        max_body_bytes: longest request body that is read; a longer one is answered with 413.
        api_keys: keys that requests must bring; empty lets everyone in. The environment variable QUIRE_API_KEYS, comma
            separated, adds to them without being written into a config.
        proxy: what stands before the ingress: Serve's own proxy, or HAProxy. The latter is switched on by
            RAY_SERVE_ENABLE_HA_PROXY=1 on every node before Ray starts there; the ingress checks that it was.
        keep_alive_s: a stream that has brought nothing for this long gets a comment line, so that proxies keep it open.
        access_log: write a line for each request for tokens when it has ended: model, status, tokens and times.
        usage: keep what tenants use of each model; null keeps nothing.
        agent_metrics_s: as in DeploymentArgs, of an ingress.
    """

    num_replicas: int = Field(default=1, ge=1)
    max_ongoing_requests: int = Field(default=2048, ge=1)
    max_body_bytes: int = Field(default=8 << 20, ge=1)
    api_keys: list[str] = Field(default_factory=list)
    proxy: Proxy = "serve"
    keep_alive_s: float = Field(default=5.0, gt=0)
    access_log: bool = False
    usage: UsageArgs | None = None
    agent_metrics_s: float | None = AGENT_METRICS_S
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
    """What an ingress takes over while it serves: Serve's `user_config`, the deployment is not restarted for it.

    Attributes:
        models: of other applications; those of the ingress's own are in its arguments.
        admission: of the ingress's own models by id, in place of what its arguments say.
        splits: name → model id → weight: requests of that name go to these models in that proportion.
    """

    models: list[RemoteModel] = Field(default_factory=list)
    admission: dict[str, AdmissionArgs] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    splits: dict[str, dict[str, float]] = Field(default_factory=dict)
    api_keys: list[str] = Field(default_factory=list)

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, value: dict[str, str]) -> dict[str, str]:
        return {check_name(alias): target for alias, target in value.items()}

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return check_splits(value)

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [model.id for model in self.models]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise ValueError(f"the model name {twice!r} is given twice")
        return self
