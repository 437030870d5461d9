from __future__ import annotations

from typing import Any

import pytest

from app.balancer.admission_settings import ClassSettings
from app.config import AppArgs, IngressUserConfig, ModelArgs
from engine.errors import ConfigError
from tests.app.config.arguments import args, model


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
        ({"klass": 1}, "admission.klass: unknown key; is it classes?"),
        ({"tenants": {"bob": 2.0}}, "tenants.bob: without tenant_header a tenant is called key- and"),
        ({"tenants": {"key-0123456789AB": 2.0}}, "without tenant_header a tenant is called"),
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


def test_one_bound_on_what_waits_on_a_replica() -> None:
    with pytest.raises(ConfigError, match=r"hold_ms takes the place of admission.replica_queue_ms: give one of them"):
        AppArgs.from_dict(args(model(balancer={"hold_ms": 10}, admission={"replica_queue_ms": 500})))
