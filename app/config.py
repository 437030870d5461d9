"""What a Serve config's `args` may say: which models, how each is deployed, and how HTTP is served.

All are frozen and checked where they are made; unknown keys are errors that list the known ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.balancer.policies import DEFAULT_POLICY, make_policy
from app.balancer.terms import DEFAULT_CLASS
from app.usage.settings import UsageSettings, split_url
from engine.config import EngineConfig
from engine.errors import ConfigError

# The name of the HTTP deployment, by which a config's `deployments` overrides its user_config.
INGRESS = "Ingress"
# By name: the router is then imported where it runs.
REQUEST_ROUTER = "app.balancer.router:BookedRequestRouter"

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def _name(value: str) -> str:
    if not _MODEL_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} must begin with a letter or digit and hold only letters, digits and . _ : / - (128 at most)"
        )
    return value


def engine_deployment_name(model_id: str) -> str:
    """What Serve calls a model's deployment: letters, digits, `.`, `_` and `-` are kept."""
    return "engine-" + re.sub(r"[^A-Za-z0-9._-]", "-", model_id)


def _splits(value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    for name, weights in value.items():
        _name(name)
        if not weights:
            raise ValueError(f"{name}: no model to go to")
        for target, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"{name}.{target}={weight} must be above 0")
    return value


class Args(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def from_dict(cls, args: Any, root: str = "args") -> Self:
        """Validate part of a config; ConfigError says in one line what is wrong and where."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            raise ConfigError(describe(error, root)) from None


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


class ScalingArgs(Args):
    """How the number of a model's replicas follows its load; see app.autoscaling.sizing. Times are in seconds.

    Attributes:
        min_replicas: 0 lets a model go that nobody uses, and needs `idle_to_zero_s`.
        initial_replicas: at the start; None is `min_replicas`.
        upscale_delay_s: more must have been needed for so long before more are started.
        downscale_delay_s: fewer must have been enough for so long before one is stopped.
        idle_to_zero_s: after so long without a request the last replica stops; the next request waits for a start.
        ttft_target_s: the first token is to come within this in 95 of 100 requests.
        target_utilization: a replica is to compute prompts no more than this part of the time, nor run more than this
            part of `max_num_seqs`.
        max_kv_use: no more of a replica's KV blocks are to be held by requests.
        downscale_margin: a replica is stopped only if the others could carry so much more than the load.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    initial_replicas: int | None = Field(default=None, ge=0)
    upscale_delay_s: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    downscale_delay_s: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    idle_to_zero_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    ttft_target_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    target_utilization: float = Field(default=0.8, gt=0, lt=1)
    max_kv_use: float = Field(default=0.85, gt=0, le=1)
    downscale_margin: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        if self.initial_replicas is not None and not self.min_replicas <= self.initial_replicas <= self.max_replicas:
            raise ValueError(
                f"initial_replicas={self.initial_replicas} is outside min_replicas={self.min_replicas} "
                f"to max_replicas={self.max_replicas}"
            )
        if self.min_replicas == 0 and self.idle_to_zero_s is None:
            raise ValueError("min_replicas=0 needs idle_to_zero_s: after how long without a request the last one stops")
        if self.min_replicas > 0 and self.idle_to_zero_s is not None:
            raise ValueError(f"idle_to_zero_s={self.idle_to_zero_s:g} needs min_replicas=0, not {self.min_replicas}")
        return self

    @property
    def scales_to_zero(self) -> bool:
        """Whether a model without replicas is as it should be."""
        return self.min_replicas == 0


# Ray's agent forgets a gauge that it has not heard of for twice its report interval, which is 10 s unless set.
_AGENT_METRICS_S = Field(default=10.0, ge=0.1, le=20)


class DeploymentArgs(Args):
    """How Serve runs the replicas of one deployment. Times are in seconds.

    Attributes:
        num_replicas: always so many; not together with `autoscaling`, which lets their number follow the load.
        max_ongoing_requests: requests a replica may have open; None lets the builder derive it from the engine's own
            bound, which it must exceed.
        graceful_shutdown_timeout_s: how long a replica that is to stop may finish its requests.
        health_check_period_s: also how long a dead replica stays unnoticed.
        max_constructor_retry_count: replicas that may fail to start before the deployment counts as failed.
        ray_actor_options: what one rank takes; a replica is one, unless `engine.tensor_parallel_size` says otherwise.
        agent_metrics_s: how often a replica hands what it counts to Ray's agent on its node; null hands it nothing.
        placement_group_strategy: where the ranks of a replica go: "STRICT_PACK" on one node, "PACK" on as few as can
            be. None is STRICT_PACK; nothing else is allowed for a single rank.
    """

    num_replicas: int = Field(default=1, ge=1)
    autoscaling: ScalingArgs | None = None
    max_ongoing_requests: int | None = Field(default=None, ge=1)
    graceful_shutdown_wait_loop_s: float = Field(default=0.2, gt=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    health_check_period_s: float = Field(default=2.0, gt=0)
    health_check_timeout_s: float = Field(default=30.0, gt=0)
    max_constructor_retry_count: int = Field(default=2, ge=1)
    ray_actor_options: RayActorOptions = RayActorOptions()
    agent_metrics_s: float | None = _AGENT_METRICS_S
    placement_group_strategy: Literal["STRICT_PACK", "PACK"] | None = None

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError("num_replicas and autoscaling contradict each other: give one of them")
        return self

    @property
    def scales_to_zero(self) -> bool:
        """Whether a model without replicas is as it should be."""
        return self.autoscaling is not None and self.autoscaling.scales_to_zero

    @property
    def most_replicas(self) -> int:
        """As many as there may be at a time."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas


class BalancerArgs(Args):
    """How an ingress spreads a model's requests over its replicas.

    Attributes:
        policy: `cheapest` weighs waiting, cached prefixes, decoding and eviction in seconds; the others are known
            balancers' rules, for comparison.
        hold_ms: a request that would wait longer than this for prompts queued on the best replica waits in the ingress
            instead, where shorter prompts go first; None sends every request on at once, and so does a fleet of more
            than 128 replicas, unless there is admission.
    """

    policy: str = DEFAULT_POLICY
    hold_ms: float | None = Field(default=None, ge=0)

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        make_policy(value)
        return value


class ClassArgs(Args):
    """A class of requests. Of several the one of the lower `priority` goes first; `ttft_deadline_s` is from a request's
    arrival to its first token: a request that would have it later is refused."""

    priority: int = Field(default=0, ge=0, le=100)
    ttft_deadline_s: float = Field(default=60.0, gt=0, le=3600)


class AdmissionArgs(Args):
    """Which requests an ingress lets wait for a model, in which order, and which it refuses.

    Attributes:
        classes: by the name that requests give in `X-Quire-Class`.
        default_class: of requests that give none; may be left out where there is one.
        max_queued_requests, max_queued_tokens: how much may wait in an ingress; tokens of prompts and expected output.
        tenants: shares of tenants that are to have more or less than others, whose is 1.
        tenant_header: requests may name their tenant in `X-Quire-Tenant`; otherwise it goes by their API key.
        replica_queue_ms: a request waits in the ingress rather than on a replica that has prompts of more than this to
            compute; a twentieth of the shortest deadline if that is less. `balancer.hold_ms` takes its place.
    """

    classes: dict[str, ClassArgs] = Field(default_factory=lambda: {DEFAULT_CLASS: ClassArgs()}, min_length=1)
    default_class: str | None = None
    max_queued_requests: int = Field(default=1024, ge=1, le=1 << 20)
    max_queued_tokens: int = Field(default=4 << 20, ge=1)
    tenants: dict[str, float] = Field(default_factory=dict)
    tenant_header: bool = False
    replica_queue_ms: float = Field(default=1000.0, gt=0, le=60_000)

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, value: dict[str, ClassArgs]) -> dict[str, ClassArgs]:
        return {_name(name): entry for name, entry in value.items()}

    @field_validator("tenants")
    @classmethod
    def _check_tenants(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0.01 <= weight <= 100:
                raise ValueError(f"{name}={weight:g} must be 0.01 to 100")
        return value

    @model_validator(mode="after")
    def _check_default(self) -> Self:
        if self.default_class is None:
            if len(self.classes) > 1:
                raise ValueError(f"default_class: which of {', '.join(self.classes)}?")
        elif self.default_class not in self.classes:
            raise ValueError(f"default_class={self.default_class!r} is none of classes: {', '.join(self.classes)}")
        return self

    @property
    def settings(self) -> AdmissionSettings:
        """As the balancer takes them."""
        return AdmissionSettings(
            classes={name: ClassSettings(one.priority, one.ttft_deadline_s) for name, one in self.classes.items()},
            default_class=self.default_class or next(iter(self.classes)),
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            tenant_header=self.tenant_header,
            tenant_weights=self.tenants,
            replica_queue_s=self.replica_queue_ms / 1000.0,
        )


def _check_hold(balancer: BalancerArgs, admission: AdmissionArgs | None) -> None:
    if balancer.hold_ms is None or admission is None:
        return
    for name, entry in admission.classes.items():
        if balancer.hold_ms >= 1000.0 * entry.ttft_deadline_s:
            raise ValueError(
                f"balancer.hold_ms={balancer.hold_ms:g} would leave requests on a replica for longer than "
                f"admission.classes.{name}.ttft_deadline_s={entry.ttft_deadline_s:g} allows"
            )


class ModelArgs(Args):
    """One model.

    Attributes:
        id: the `model` that requests name.
        source: where its weights are: a folder, `package:NAME`, `s3://BUCKET/PREFIX`, `hf:ORG/NAME`, `dummy:NAME`.
        engine: engine options, checked with EngineConfig.
        balancer: how requests are spread over its replicas.
        admission: which requests may wait for it, and which are refused; null lets all wait on its replicas.
        aliases: further names that requests may use.
        chat_template: a Jinja template, for a checkpoint that has none or in place of its own.
        adapters: name → PEFT folder of a LoRA adapter: on each node that runs a replica, `s3://BUCKET/PREFIX` or
            `hf:ORG/NAME`; requests name it `id:name`.
            The engine's `max_loras`, `max_lora_rank` and `adapter_memory` bound them.
    """

    id: str
    source: str = Field(min_length=1)
    adapters: dict[str, str] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)
    deployment: DeploymentArgs = DeploymentArgs()
    balancer: BalancerArgs = BalancerArgs()
    admission: AdmissionArgs | None = AdmissionArgs()
    aliases: list[str] = Field(default_factory=list)
    chat_template: str | None = None

    _check_id = field_validator("id")(_name)

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

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.adapters and "adapters" in self.engine:
            raise ValueError("adapters: they are given in engine.adapters, too; give them in one place")
        try:
            EngineConfig.from_dict(self.engine_options)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for name in self.engine_config.adapters:
            _name(f"{self.id}:{name}")
        return self

    @model_validator(mode="after")
    def _check_admission(self) -> Self:
        _check_hold(self.balancer, self.admission)
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        size, options = self.engine_config.tensor_parallel_size, self.deployment.ray_actor_options
        if size == 1 and self.deployment.placement_group_strategy is not None:
            raise ValueError("deployment.placement_group_strategy needs engine.tensor_parallel_size above 1")
        if size > 1 and self.engine_config.device == "cuda" and options.num_gpus < 1:
            raise ValueError(
                f"engine.tensor_parallel_size={size} on device='cuda' is more ranks than GPUs: "
                f"deployment.ray_actor_options.num_gpus={options.num_gpus:g} must be 1 or more, for each rank"
            )
        if size > 1 and not (options.num_cpus or options.num_gpus or options.resources):
            raise ValueError("deployment.ray_actor_options: a rank must take some resource, for its place in the group")
        return self

    @property
    def engine_options(self) -> dict[str, Any]:
        """`engine`, with the model's adapters."""
        return {"enable_lora": True, **self.engine, "adapters": self.adapters} if self.adapters else self.engine

    @property
    def engine_config(self) -> EngineConfig:
        """The engine options as the engine takes them."""
        return EngineConfig.from_dict(self.engine_options)

    @property
    def served_ids(self) -> list[str]:
        """What requests may name: the model, and each of its adapters."""
        return [self.id, *(f"{self.id}:{name}" for name in self.engine_config.adapters)]


Proxy = Literal["serve", "haproxy"]


class UsageArgs(Args):
    """Usage by tenant, model and adapter, kept in files by each ingress replica; see app.usage.

    Attributes:
        directory: on each node that runs an ingress, or one that they share; its own for each application.
        roll_mb, roll_s: a segment that has grown so large or so old is closed, and added to the days' totals.
        fsync_s: a record is on the disk after so long; a power failure loses what is not.
        progress_s: how often the tokens of requests that still run are noted.
        keep_days: how long segments are kept once they are in the totals, which stay; null keeps them all.
        copy_to: `s3://BUCKET[/PREFIX]`: closed segments are copied there.
    """

    directory: str
    roll_mb: float = Field(default=16.0, gt=0, le=1024)
    roll_s: float = Field(default=3600.0, ge=1, le=86400)
    fsync_s: float = Field(default=1.0, ge=0.05, le=60)
    progress_s: float = Field(default=10.0, ge=0.05, le=3600)
    keep_days: float | None = Field(default=None, ge=0)
    copy_to: str | None = None

    @field_validator("directory")
    @classmethod
    def _check_directory(cls, value: str) -> str:
        if not Path(value).is_absolute():
            raise ValueError(f"{value!r} must be an absolute path: ingresses run in folders of Ray's")
        return value

    @field_validator("copy_to")
    @classmethod
    def _check_copy_to(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                split_url(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def settings(self) -> UsageSettings:
        """As the ledger takes them."""
        return UsageSettings(
            Path(self.directory),
            roll_bytes=int(self.roll_mb * (1 << 20)),
            roll_s=self.roll_s,
            sync_s=self.fsync_s,
            progress_s=self.progress_s,
            keep_days=self.keep_days,
            copy_to=self.copy_to,
        )


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
    agent_metrics_s: float | None = _AGENT_METRICS_S
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


class RemoteModel(Args):
    """A model of another Serve application, as the ingress's table lists it.

    Attributes:
        id: the `model` that requests name, and the id in that application.
        application: its name in Serve.
        source, chat_template: as in that application's entry, for the tokenizer.
        balancer: how this ingress spreads requests over its replicas.
        admission: as in ModelArgs.
        adapters: names of the adapters that it has in that application.
    """

    id: str
    application: str = Field(min_length=1)
    source: str = Field(min_length=1)
    chat_template: str | None = None
    balancer: BalancerArgs = BalancerArgs()
    admission: AdmissionArgs | None = AdmissionArgs()
    adapters: tuple[str, ...] = ()

    _check_id = field_validator("id")(_name)

    @model_validator(mode="after")
    def _check_admission(self) -> Self:
        _check_hold(self.balancer, self.admission)
        return self

    @property
    def connection(self) -> tuple[object, ...]:
        """What its client is made by: the entry, but for what can change while that serves."""
        return (self.admission is not None, *(value for name, value in self if name != "admission"))


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
        return {_name(alias): target for alias, target in value.items()}

    @field_validator("splits")
    @classmethod
    def _check_splits(cls, value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return _splits(value)

    @model_validator(mode="after")
    def _check_ids(self) -> Self:
        ids = [model.id for model in self.models]
        if twice := next((name for name in ids if ids.count(name) > 1), None):
            raise ValueError(f"the model name {twice!r} is given twice")
        return self


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
        return _splits(value)

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


def describe(error: ValidationError, root: str) -> str:
    """The first of pydantic's complaints in one line: `args.models[0].id: ...`."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = root + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{where}: {message}" + (f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else "")
