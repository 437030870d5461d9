"""A Serve that runs with Ray in this test's own processes, deployed to as `serve deploy` does, and asked over HTTP."""

from __future__ import annotations

import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.ingress.receipt import HEADER as RECEIPT_HEADER
from benchmarks.fleet.server import free_port

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[2]
# Tokens of a long stream.
LONG = 400


def model_app(
    identifier: str, source: str, num_replicas: int = 1, engine: dict[str, Any] | None = None
) -> dict[str, Any]:
    """An application that is one model."""
    options = {"num_blocks": 512, "max_model_len": 1024, "num_threads": 1, **(engine or {})}
    deployment = {"num_replicas": num_replicas}
    return {
        "name": f"app-{identifier}",
        "route_prefix": None,
        "import_path": "app.builder:build_model",
        "args": {"model": {"id": identifier, "source": source, "engine": options, "deployment": deployment}},
    }


def ingress_app(num_replicas: int, user_config: dict[str, Any]) -> dict[str, Any]:
    """An application that is the ingress alone."""
    settings = {"graceful_shutdown_timeout_s": 120}
    return {
        "name": "ingress",
        "route_prefix": "/",
        "import_path": "app.builder:build_ingress",
        "args": {"ingress": settings},
        # Here, not in the arguments: those would restart what they change.
        "deployments": [{"name": "Ingress", "num_replicas": num_replicas, "user_config": user_config}],
    }


def entry(identifier: str, source: str, **fields: Any) -> dict[str, Any]:
    """A model of another application, in an ingress's user_config."""
    return {"id": identifier, "application": f"app-{identifier}", "source": source, **fields}


class Fleet:
    """A running Serve, deployed to as `serve deploy` does, and asked over HTTP."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.applications: list[dict[str, Any]] = []
        self._client: Any = _get_global_client()

    def deploy(self, *applications: dict[str, Any]) -> None:
        self.applications = [copy.deepcopy(application) for application in applications]
        self._client.deploy_apps(ServeDeploySchema.model_validate({"applications": self.applications}))

    def wait_running(self) -> None:
        def running() -> bool:
            details = self._client.get_serve_details()["applications"]
            return all(details.get(app["name"], {}).get("status") == "RUNNING" for app in self.applications)

        until(running)

    def replica_ids(self) -> dict[str, set[str]]:
        """Of each deployment, those that run."""
        return {
            name: {replica["replica_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"}
            for app in self._client.get_serve_details()["applications"].values()
            for name, deployment in app["deployments"].items()
        }

    def names(self) -> list[str]:
        with urlopen(f"{self.url}/v1/models", timeout=30) as response:
            return [item["id"] for item in json.load(response)["data"]]

    def metrics(self) -> dict[str, Metric]:
        with urlopen(f"{self.url}/metrics", timeout=30) as response:
            return {family.name: family for family in text_string_to_metric_families(response.read().decode())}

    def ask(self, model: str, **fields: Any) -> dict[str, Any]:
        """A completion, with its route receipt."""
        return dict(json.loads(self._post({"model": model, "prompt": [1, 2, 3], **fields}, {RECEIPT_HEADER: "1"})))

    def stream(self, model: str, seed: int) -> str:
        """The text of a long stream; what breaks it fails the test."""
        fields = {"max_tokens": LONG, "ignore_eos": True, "temperature": 0.8, "seed": seed, "stream": True}
        body = self._post({"model": model, "prompt": [seed + 1, 2, 3], **fields})
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        assert body.rstrip().endswith("data: [DONE]"), "the stream was cut"
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(event["choices"][0]["text"] for event in events)

    def _post(self, body: dict[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> str:
        headers = {"content-type": "application/json", **headers}
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=240) as response:
            return str(response.read().decode())


def until(condition: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if condition():
                return
        except (URLError, ConnectionError):
            pass
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.1)


@contextmanager
def running_fleet() -> Iterator[Fleet]:
    """A Serve without applications. Its processes have this one's environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=8,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        )
        try:
            port = free_port()
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            yield Fleet(port)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
            logging.getLogger("ray.serve").handlers.clear()
