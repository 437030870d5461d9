"""A model: one that an application deploys, or one of another application that an ingress serves."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from app.config.args import Args
from app.config.deployment import DeploymentArgs
from app.config.names import check_name
from app.config.routing import AdmissionArgs, BalancerArgs, check_hold
from engine.config import EngineConfig
from engine.errors import ConfigError


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

    _check_id = field_validator("id")(check_name)

    @field_validator("aliases")
    @classmethod
    def _check_aliases(cls, value: list[str]) -> list[str]:
        return [check_name(alias) for alias in value]

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
            check_name(f"{self.id}:{name}")
        return self

    @model_validator(mode="after")
    def _check_admission(self) -> Self:
        check_hold(self.balancer, self.admission)
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

    @model_validator(mode="after")
    def _check_open_requests(self) -> Self:
        given, at_once = self.deployment.max_ongoing_requests, self.engine_config.max_num_seqs
        if given is not None and given < at_once:
            raise ValueError(
                f"deployment.max_ongoing_requests={given} is below engine.max_num_seqs={at_once}: Serve would keep "
                "requests from an engine that has room for them"
            )
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

    _check_id = field_validator("id")(check_name)

    @model_validator(mode="after")
    def _check_admission(self) -> Self:
        check_hold(self.balancer, self.admission)
        return self

    @property
    def connection(self) -> tuple[object, ...]:
        """What its client is made by: the entry, but for what can change while that serves."""
        return (self.admission is not None, *(value for name, value in self if name != "admission"))
