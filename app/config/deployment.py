"""How a model's engine is deployed: replicas, their scaling, and what an actor asks of Ray."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from app.config.args import AGENT_METRICS_S, Args


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
    upscale_delay_s: float = Field(default=1.0, ge=0)
    downscale_delay_s: float = Field(default=60.0, ge=0)
    idle_to_zero_s: float | None = Field(default=None, gt=0)
    ttft_target_s: float = Field(default=1.0, gt=0)
    target_utilization: float = Field(default=0.8, gt=0, lt=1)
    max_kv_use: float = Field(default=0.85, gt=0, le=1)
    downscale_margin: float = Field(default=0.1, ge=0)

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
    agent_metrics_s: float | None = AGENT_METRICS_S
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
    def first_replicas(self) -> int:
        """With as many it starts."""
        if self.autoscaling is None:
            return self.num_replicas
        initial = self.autoscaling.initial_replicas
        return self.autoscaling.min_replicas if initial is None else initial

    @property
    def most_replicas(self) -> int:
        """As many as there may be at a time."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas
