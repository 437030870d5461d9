"""Names that the application, its Serve config and its users share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

# The name of the HTTP deployment, by which a config's `deployments` overrides its user_config.
INGRESS = "Ingress"
# The root of a model's own application.
ANCHOR = "Model"
# By name: the router is then imported where it runs.
REQUEST_ROUTER = "app.balancer.router:BookedRequestRouter"

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def check_name(value: str) -> str:
    if not _MODEL_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} must begin with a letter or digit and hold only letters, digits and . _ : / - (128 at most)"
        )
    return value


def engine_deployment_name(model_id: str) -> str:
    """What Serve calls a model's deployment: letters, digits, `.`, `_` and `-` are kept."""
    return "engine-" + re.sub(r"[^A-Za-z0-9._-]", "-", model_id)


def deployment_names(model_ids: Iterable[str]) -> dict[str, str]:
    """Model id → the name of its deployment, for one application: numbered where two come out alike."""
    names: dict[str, str] = {}
    for model_id in model_ids:
        base = engine_deployment_name(model_id)
        name, number = base, 2
        while name in names.values():
            name, number = f"{base}-{number}", number + 1
        names[model_id] = name
    return names


def check_splits(value: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    for name, weights in value.items():
        check_name(name)
        if not weights:
            raise ValueError(f"{name}: no model to go to")
        for target, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"{name}.{target}={weight} must be above 0")
    return value
