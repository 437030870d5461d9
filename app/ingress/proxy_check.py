"""Does every process agree on what stands before the ingress? Asked once, at its start.

Serve's HAProxy mode hangs on an environment variable that controller and replicas read each for themselves. Where they
disagree nothing fails: HAProxy runs without a backend, or replicas open ports that nobody uses.
"""

from __future__ import annotations

import os
from typing import Any

from app.config import Proxy
from engine.errors import ConfigError

VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_ADVICE = f"export {VARIABLE} before `ray start` on every node, head and workers alike: no config can set it later"


def check_proxy(wanted: Proxy, controller: bool, replica: bool) -> None:
    """Compare the config with the environments of Serve's controller and of this replica.

    Raises:
        ConfigError: they differ; says which, and what to do.
    """
    if controller != replica:
        raise ConfigError(
            f"HAProxy mode is {_word(controller)} in Serve's controller and {_word(replica)} in this ingress replica: "
            f"{_ADVICE}"
        )
    if wanted == "haproxy" and not controller:
        raise ConfigError(f"ingress.proxy='haproxy', but HAProxy mode is off: {_ADVICE}")
    if wanted == "serve" and controller:
        raise ConfigError(
            f"ingress.proxy='serve', but HAProxy mode is on: set ingress.proxy to haproxy, or unset {VARIABLE}"
        )


def replica_has_haproxy() -> bool:
    """Whether this process runs in HAProxy mode, read as Serve reads it."""
    return os.environ.get(VARIABLE, "0") == "1"


def controller_has_haproxy() -> bool:
    """Whether Serve's controller does. Blocks for one call of the controller."""
    import ray
    from ray.serve.context import _get_global_client

    # Private to Serve, whose version is pinned.
    client: Any = _get_global_client()
    return bool(ray.get(client._controller.__ray_call__.remote(lambda controller: controller._ha_proxy_enabled)))


def _word(switched_on: bool) -> str:
    return "on" if switched_on else "off"
