"""Settings: what is wrong is named, with its place; what is right arrives as written."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.config import AppArgs, IngressUserConfig, ModelAppArgs
from engine.errors import ConfigError
from tests.app.config.arguments import args, model


def test_defaults() -> None:
    parsed = AppArgs.from_dict(args())
    assert parsed.models[0].deployment.num_replicas == 1
    assert parsed.models[0].deployment.health_check_period_s == 2.0
    assert parsed.models[0].deployment.ray_actor_options.num_cpus < 1
    assert parsed.ingress.max_ongoing_requests > 5, "Serve's own default would queue the sixth request"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "args.models: Field required"),
        ({"models": []}, "args.models: List should have at least 1 item"),
        (args(ingres={}), "args.ingres: unknown key"),
        (
            args(ingress={"agent_metrics_s": 60}),
            "ingress.agent_metrics_s: Input should be less than or equal to 20",
        ),
        (args(ingress={"usage": {}}), "args.ingress.usage.directory: Field required"),
        (args(ingress={"usage": {"directory": "usage"}}), "usage.directory: 'usage' must be an absolute path"),
        (args(ingress={"usage": {"directory": "/u", "roll_mb": 0}}), "usage.roll_mb: Input should be greater than 0"),
        (args(ingress={"usage": {"directory": "/u", "copy_to": "gs://b"}}), "'gs://b' must be s3://BUCKET"),
        (args(model(), model()), "the model name 'm' is given twice"),
        (args(model(aliases=["m"])), "the model name 'm' is given twice"),
        (args(model(), model(id="n", aliases=["m"])), "the model name 'm' is given twice"),
        (args(model(id="")), "args.models[0].id: '' must begin with a letter or digit"),
        (args(model(id="a b")), "args.models[0].id: 'a b' must begin"),
        (args(model(id="#1")), "args.models[0].id"),
        (args(model(id="x" * 129)), "args.models[0].id"),
        (args(model(aliases=["ok", "not ok"])), "args.models[0].aliases: 'not ok' must begin"),
        (args(model(source="")), "args.models[0].source"),
        (args(model(engin={})), "args.models[0].engin: unknown key"),
        (args(model(engine={"blok_size": 16})), "args.models[0].engine: unknown engine option blok_size; known: "),
        (args(model(engine={"block_size": 3})), "args.models[0].engine: block_size=3 must be a power of two"),
        (args(model(deployment={"num_replicas": 0})), "args.models[0].deployment.num_replicas"),
        (args(model(deployment={"cpus": 1})), "args.models[0].deployment.cpus: unknown key"),
        (args(model(deployment={"ray_actor_options": {"num_cpu": 1}})), "ray_actor_options.num_cpu: unknown key"),
        (
            args(model(engine={"tensor_parallel_size": 2, "device": "cuda"})),
            "args.models[0]: engine.tensor_parallel_size=2 on device='cuda' is more ranks than GPUs: deployment.",
        ),
        (
            args(model(deployment={"placement_group_strategy": "PACK"})),
            "args.models[0]: deployment.placement_group_strategy needs engine.tensor_parallel_size above 1",
        ),
        (
            args(model(engine={"tensor_parallel_size": 2}, deployment={"placement_group_strategy": "SPREAD"})),
            "args.models[0].deployment.placement_group_strategy: Input should be 'STRICT_PACK' or 'PACK'",
        ),
        (
            args(model(engine={"tensor_parallel_size": 2}, deployment={"ray_actor_options": {"num_cpus": 0}})),
            "args.models[0]: deployment.ray_actor_options: a rank must take some resource",
        ),
        (
            args(model(deployment={"num_replicas": 2, "autoscaling": {"max_replicas": 4}})),
            "args.models[0].deployment: num_replicas and autoscaling contradict each other",
        ),
        (args(model(deployment={"autoscaling": {}})), "args.models[0].deployment.autoscaling.max_replicas: Field"),
        (
            args(model(deployment={"autoscaling": {"min_replicas": 5, "max_replicas": 4}})),
            "args.models[0].deployment.autoscaling: min_replicas=5 is above max_replicas=4",
        ),
        (
            args(model(deployment={"autoscaling": {"max_replicas": 4, "initial_replicas": 5}})),
            "deployment.autoscaling: initial_replicas=5 is outside min_replicas=1 to max_replicas=4",
        ),
        (
            args(model(deployment={"autoscaling": {"min_replicas": 0, "max_replicas": 4}})),
            "deployment.autoscaling: min_replicas=0 needs idle_to_zero_s",
        ),
        (
            args(model(deployment={"autoscaling": {"max_replicas": 4, "idle_to_zero_s": 60}})),
            "deployment.autoscaling: idle_to_zero_s=60 needs min_replicas=0, not 1",
        ),
        (
            args(model(deployment={"autoscaling": {"max_replicas": 4, "target_utilization": 1}})),
            "deployment.autoscaling.target_utilization",
        ),
        (
            args(model(deployment={"autoscaling": {"max_replicas": 4, "target_ongoing_requests": 1}})),
            "deployment.autoscaling.target_ongoing_requests: unknown key",
        ),
        (args(ingress={"api_keys": [" x"]}), "args.ingress.api_keys: keys must not"),
        (args(ingress={"max_body_bytes": 0}), "args.ingress.max_body_bytes"),
        (args(ingress={"proxy": "nginx"}), "args.ingress.proxy: Input should be 'serve' or 'haproxy'"),
        (args(ingress={"keep_alive_s": 0}), "args.ingress.keep_alive_s"),
        (args(splits={"s": {}}), "args.splits: s: no model to go to"),
        (args(splits={"s": {"m": 0}}), "args.splits: s.m=0.0 must be above 0"),
        (args(splits={"s": {"n": 1}}), "splits.s: 'n' is not the id of a model"),
        (args(splits={"m": {"m": 1}}), "the model name 'm' is given twice"),
        (args(splits={"a b": {"m": 1}}), "args.splits: 'a b' must begin"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppArgs.from_dict(wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        AppArgs.from_dict(args(a=1, b=2))


def test_settings_are_frozen() -> None:
    parsed = AppArgs.from_dict(args())
    with pytest.raises(ValidationError):
        parsed.models[0].id = "other"


def test_aliases_of_all_models() -> None:
    parsed = AppArgs.from_dict(args(model(aliases=["a", "b"]), model(id="n", aliases=["c"])))
    assert parsed.aliases == {"a": "m", "b": "m", "c": "n"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alias": {}}, "user_config.alias: unknown key"),
        ({"models": [{"id": "a", "source": "x"}]}, "user_config.models[0].application"),
        ({"models": [{"id": "a", "source": "x", "application": "y"}] * 2}, "the model name 'a' is given twice"),
        ({"aliases": {"a b": "c"}}, "user_config.aliases: 'a b' must begin"),
        ({"splits": {"s": {"a": -1}}}, "user_config.splits: s.a=-1.0 must be above 0"),
    ],
)
def test_a_wrong_user_config_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        IngressUserConfig.from_dict(wrong, "user_config")
    assert message in str(caught.value)


def test_a_model_of_its_own_application_has_no_names_to_give() -> None:
    parsed = ModelAppArgs.from_dict({"model": model()})
    assert [entry.id for entry in parsed.models] == ["m"]
    with pytest.raises(ConfigError, match=r"model.aliases: give them in the user_config of the ingress"):
        ModelAppArgs.from_dict({"model": model(aliases=["z"])})
