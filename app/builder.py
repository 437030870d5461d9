"""What `serve run` imports: build(args), one engine deployment a model and the ingress in front of them; or, for
configs with an application for each, build_model and build_ingress."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from app.autoscaling.serve_options import autoscaling_config
from app.config import (
    ANCHOR,
    INGRESS,
    REQUEST_ROUTER,
    AppArgs,
    DeploymentArgs,
    IngressAppArgs,
    IngressArgs,
    IngressUserConfig,
    ModelAppArgs,
    ModelArgs,
    RayActorOptions,
    deployment_names,
    engine_deployment_name,
)
from app.ingress.deployment import Ingress
from app.replica.anchor import ModelAnchor
from app.replica.deployment import EngineReplica
from app.replica.placement import placement_options, rank_bundles
from app.replica.supply import check_supply, cluster_supply

# Requests beyond what an engine runs at once wait in its own queue, which knows their cost; Serve's knows nothing.
_ONGOING_PER_SEQUENCE = 8


def build(args: AppArgs | dict[str, Any]) -> Application:
    """The application that `args` describe: `Ingress` bound to one `engine-<id>` deployment a model.

    Serve hands over the YAML's mapping as it stands. Raises ConfigError, which names what is wrong in it.
    """
    args = args if isinstance(args, AppArgs) else AppArgs.from_dict(args)
    names = deployment_names(model.id for model in args.models)
    engines = {model.id: _engine_deployment(model, names[model.id]) for model in args.models}
    user_config = IngressUserConfig(aliases=args.aliases, splits=args.splits, api_keys=args.ingress.api_keys)
    # Names go by user_config alone: what is in the arguments restarts every deployment when it changes.
    models = [model.model_copy(update={"aliases": []}) for model in args.models]
    return _ingress(args.ingress, user_config).bind(models, _settings(args.ingress), engines)


def build_model(args: ModelAppArgs | dict[str, Any]) -> Application:
    """An application that is one model: its engine deployment, for an ingress of another application."""
    args = args if isinstance(args, ModelAppArgs) else ModelAppArgs.from_dict(args)
    anchor = _deployment(ModelAnchor).options(
        name=ANCHOR,
        autoscaling_config=AutoscalingConfig(min_replicas=0, initial_replicas=0, max_replicas=1),
        ray_actor_options={"num_cpus": 0},
    )
    application: Application = anchor.bind(_engine_deployment(args.model, engine_deployment_name(args.model.id)))
    return application


def build_ingress(args: IngressAppArgs | dict[str, Any]) -> Application:
    """An application that is the ingress alone. Its models are those of the `user_config` that the config gives it."""
    args = args if isinstance(args, IngressAppArgs) else IngressAppArgs.from_dict(args)
    user_config = IngressUserConfig(api_keys=args.ingress.api_keys)
    return _ingress(args.ingress, user_config).bind([], _settings(args.ingress), {})


def _ingress(args: IngressArgs, user_config: IngressUserConfig) -> Deployment:
    return _deployment(Ingress).options(
        name=INGRESS,
        user_config=user_config.model_dump(),
        **_serve_options(args),
        max_ongoing_requests=args.max_ongoing_requests,
    )


def _settings(args: IngressArgs) -> IngressArgs:
    """What an ingress replica is made with: keys reach it by user_config alone."""
    return args.model_copy(update={"api_keys": []})


def engine_max_ongoing_requests(model: ModelArgs) -> int:
    """Requests one engine replica may have open: more than the engine itself runs, so that Serve never queues first."""
    if model.deployment.max_ongoing_requests is not None:
        return model.deployment.max_ongoing_requests
    return _ONGOING_PER_SEQUENCE * model.engine_config.max_num_seqs


def _engine_deployment(model: ModelArgs, name: str) -> Application:
    actor_options = _actor_options(model.deployment.ray_actor_options)
    placement = placement_options(model)
    # `serve run` builds inside the cluster, elsewhere there may be none.
    if placement and ray.is_initialized():
        check_supply(model.id, rank_bundles(model), placement["placement_group_strategy"], cluster_supply())
    deployment = _deployment(EngineReplica).options(
        name=name,
        **_serve_options(model.deployment),
        max_constructor_retry_count=model.deployment.max_constructor_retry_count,
        max_ongoing_requests=engine_max_ongoing_requests(model),
        request_router_config=RequestRouterConfig(
            request_router_class=REQUEST_ROUTER,  # type: ignore[arg-type]
            request_router_kwargs={"scales_to_zero": model.deployment.scales_to_zero},
        ),
        **placement,
    )
    if model.engine_config.num_threads is not None:
        actor_options = _with_threads(actor_options, model.engine_config.num_threads)
        deployment = deployment.options(ray_actor_options=actor_options)
    application: Application = deployment.bind(
        model.id, model.source, model.engine_options, model.deployment.agent_metrics_s
    )
    return application


def _deployment(cls: type) -> Deployment:
    # Serve types its decorator for use with `@` alone.
    deployment: Deployment = serve.deployment(cls)  # type: ignore[assignment]
    return deployment


def _serve_options(args: DeploymentArgs | IngressArgs) -> dict[str, Any]:
    scaling = args.autoscaling if isinstance(args, DeploymentArgs) else None
    return {
        **({"autoscaling_config": autoscaling_config(scaling)} if scaling else {"num_replicas": args.num_replicas}),
        "graceful_shutdown_wait_loop_s": args.graceful_shutdown_wait_loop_s,
        "graceful_shutdown_timeout_s": args.graceful_shutdown_timeout_s,
        "health_check_period_s": args.health_check_period_s,
        "health_check_timeout_s": args.health_check_timeout_s,
        "ray_actor_options": _actor_options(args.ray_actor_options),
    }


def _actor_options(options: RayActorOptions) -> dict[str, Any]:
    return options.model_dump(exclude_none=True)


def _with_threads(actor_options: dict[str, Any], num_threads: int) -> dict[str, Any]:
    """Ray would set OMP_NUM_THREADS to the replica's (logical) CPUs, here mostly 1."""
    runtime_env = dict(actor_options.get("runtime_env", {}))
    runtime_env["env_vars"] = {"OMP_NUM_THREADS": str(num_threads), **runtime_env.get("env_vars", {})}
    return {**actor_options, "runtime_env": runtime_env}
