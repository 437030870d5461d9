"""What is said of a setting that is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from app.config import AppArgs, IngressUserConfig
from engine.errors import ConfigError
from tests.app.config.arguments import args, model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modles": []}, r"^args\.modles: unknown key; is it models\?; known: ingress, models, splits \(and 1 more\)$"),
        (args(model(colour="red")), r"^args\.models\[0\]\.colour: unknown key; known: adapters, admission, aliases"),
        (
            args(model(deployment={"num_replica": 3})),
            r"deployment\.num_replica: unknown key; is it num_replicas\?; known",
        ),
        (
            args(model(deployment={"autoscaling": {"max_replica": 3}})),
            r"autoscaling\.max_replica: unknown key; is it max_replicas\?; known: downscale_delay_s.*\(and 1 more\)$",
        ),
        (
            args(model(admission={"classes": {"a": {"prioritty": 1}}})),
            r"classes\.a\.prioritty: unknown key; is it priority\?; known: priority, ttft_deadline_s$",
        ),
    ],
)
def test_a_misspelt_key_is_named_before_what_it_leaves_missing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AppArgs.from_dict(given)


def test_keys_of_a_user_config_are_told_too() -> None:
    with pytest.raises(ConfigError, match=r"models\[0\]\.app: unknown key.* known: adapters, admission, app"):
        IngressUserConfig.from_dict({"models": [{"id": "a", "app": "b", "source": "c"}]}, "user_config")


@pytest.mark.parametrize(
    "given",
    [
        args(ingress={"keep_alive_s": float("inf")}),
        args(model(deployment={"graceful_shutdown_timeout_s": float("inf")})),
        args(model(balancer={"hold_ms": float("nan")})),
    ],
)
def test_numbers_are_finite(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="finite number"):
        AppArgs.from_dict(given)
