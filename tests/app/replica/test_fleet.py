"""Two real replicas under Ray Serve, one client: concurrency, a killed replica, a reader that leaves, a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from engine.errors import RequestError
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from app.ingress.replica_client import ReplicaSetClient
    from app.replica.deployment import EngineReplica

# Ray leaves sockets and subprocesses to the garbage collector.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.anyio, pytest.mark.ray]

ROOT = Path(__file__).parents[3]
NUM_TOKENS = 150


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context: Any = ray.init(
            num_cpus=4,
            object_store_memory=200_000_000,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        )
        session = Path(context.address_info["session_dir"]).name
        serve.start(proxy_location="Disabled")
        yield deploy(num_replicas=2)
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
        logging.getLogger("ray.serve").handlers.clear()
    assert not _wait_for_end_of(session), "processes of the cluster were left behind"


def deploy(num_replicas: int) -> Any:
    deployment = cast(serve.Deployment, serve.deployment(EngineReplica)).options(
        name="engine-tiny",
        num_replicas=num_replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.5},
        health_check_period_s=1,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        request_router_config=RequestRouterConfig(
            request_router_class="app.balancer.router:BookedRequestRouter"  # type: ignore[arg-type]
        ),
    )
    engine_options = {"num_threads": 1, "num_blocks": 1024, "dtype": "float32"}
    return serve.run(deployment.bind("tiny", "dummy:tiny", engine_options), name="tiny", route_prefix=None)


def _wait_for_end_of(session: str, timeout_s: float = 10.0) -> list[str]:
    """Command lines of processes that still name the Ray session."""
    deadline = time.monotonic() + timeout_s
    while (left := _processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _processes_of(session: str) -> list[str]:
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if session in line:
            lines.append(line)
    return lines


@asynccontextmanager
async def connected(handle: Any, num_replicas: int) -> AsyncIterator[ReplicaSetClient]:
    client = ReplicaSetClient("tiny", handle)
    try:
        assert await client.wait_ready(60)
        await until(lambda: client.state().num_replicas == num_replicas, 60)
        yield client
    finally:
        await client.close()


async def until(condition: Any, timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of other processes
            await asyncio.sleep(0.002)


def request(number: int) -> EngineRequest:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=number, temperature=0.0 if number % 2 else 0.8)
    return EngineRequest(f"request-{number}", [number + 1, *range(2, 40)], params)


async def tokens(client: ReplicaSetClient, number: int, progress: list[int]) -> list[int]:
    received: list[int] = []
    async with aclosing(client.generate(request(number))) as stream:
        async for outputs in stream:
            for output in outputs:
                received += output.token_ids
            progress[number] = len(received)
    return received


async def run_all(client: ReplicaSetClient, progress: list[int]) -> list[list[int]]:
    return await asyncio.gather(*(tokens(client, number, progress) for number in range(len(progress))))


def booked_pids(client: ReplicaSetClient) -> dict[int, int]:
    """Process id of each live replica → requests booked there."""
    pids: dict[str, int] = {info.replica_id: info.metadata["pid"] for info in client._links.live}
    return {pid: len(client._balancer.bookings_at(replica_id)) for replica_id, pid in pids.items()}


def used_blocks(client: ReplicaSetClient) -> list[int]:
    """KV blocks in use on each replica, as last reported."""
    fleet = client._balancer._fleet
    slots = [fleet.slot_of(info.replica_id) for info in client._links.live]
    loads = [fleet.loads[slot] for slot in slots if slot is not None]
    return [load.num_blocks - load.num_free_blocks for load in loads]


async def test_concurrent_requests_a_killed_replica_and_a_reader_that_leaves(handle: Any) -> None:
    async with connected(handle, 2) as client:
        undisturbed = await run_all(client, [0] * 32)
        assert {len(received) for received in undisturbed} == {NUM_TOKENS}
        assert client._balancer.num_bookings == 0

        progress = [0] * 32
        running = asyncio.get_running_loop().create_task(run_all(client, progress))
        await until(lambda: min(progress) >= 1 and max(progress) >= 20, 30)
        load = booked_pids(client)
        victim = max(load, key=lambda pid: load[pid])
        assert load[victim] >= 8, load
        assert min(load.values()) >= 4, f"the balancer left a replica idle: {load}"
        assert min(progress) < NUM_TOKENS
        os.kill(victim, signal.SIGKILL)
        assert await running == undisturbed

        # The survivor serves on; Serve brings a replacement, which is found and dialled.
        assert (await run_all(client, [0] * 4)) == undisturbed[:4]
        await until(lambda: victim not in booked_pids(client) and client.state().num_replicas == 2, 60)

        with pytest.raises(RequestError):
            await anext(client.generate(EngineRequest("long", [1] * 600, SamplingParams(max_tokens=1))))

        stream = client.generate(request(0))
        await anext(stream)
        await until(lambda: sum(used_blocks(client)) > 0, 5)
        await stream.aclose()
        began = time.monotonic()
        await until(lambda: sum(used_blocks(client)) == 0, 5)
        assert time.monotonic() - began < 0.5


async def test_a_new_client_finds_the_running_replicas(handle: Any) -> None:
    async with connected(handle, 2) as client:
        assert client.state().max_model_len == 512
        assert len(await tokens(client, 0, [0])) == NUM_TOKENS


async def test_a_replica_that_serve_stops_is_left_without_a_seam(handle: Any) -> None:
    async with connected(handle, 2) as client:
        undisturbed = await run_all(client, [0] * 8)
        progress = [0] * 8
        running = asyncio.get_running_loop().create_task(run_all(client, progress))
        await until(lambda: min(progress) >= 1, 30)
        await asyncio.to_thread(deploy, num_replicas=1)
        assert await running == undisturbed
        await until(lambda: client.state().num_replicas == 1, 30)
