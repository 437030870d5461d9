"""The same on a real Serve application with simulated devices: clients over HTTP, and the ingresses' memory."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import uvloop

from app.balancer.terms import DEFAULT_CLASS
from app.config import INGRESS
from app.ingress.request_terms import TENANT_HEADER
from benchmarks.fleet.server import MODEL, free_port, serve_config, serving
from benchmarks.overload.report import Try
from benchmarks.overload.scenarios import CHECKPOINT, Scenario, Shape, summary
from benchmarks.overload.workload import Coming, jitter_s
from benchmarks.serving.client import StreamRecord, completion_request
from benchmarks.serving.load import ConnectionPool

APPLICATION = "overload"
_MEMORY_INTERVAL_S = 1.0
# Token ids that mean text, and prompts that share no block.
_FIRST_TOKEN, _NUM_TOKENS = 100, 8000


def config_of(shape: Shape, port: int) -> dict[str, Any]:
    """The Serve config of the fleet."""
    blocks = shape.seats * (shape.lengths.prompt[1] + shape.lengths.output[1]) // 16 + 64
    model = {
        "id": MODEL,
        "source": CHECKPOINT,
        "engine": {
            "device": f"simulated:prefill={shape.prefill_tokens_per_s:g},step_ms={shape.step_s * 1e3:g}",
            "num_blocks": blocks,
            "max_num_seqs": shape.seats,
            "max_num_batched_tokens": shape.step_tokens,
        },
        "admission": {"classes": {DEFAULT_CLASS: {"ttft_deadline_s": shape.ttft_s}}, "tenant_header": True},
        "deployment": {"num_replicas": shape.num_replicas, "ray_actor_options": {"num_cpus": 0.1}},
    }
    application = {
        "name": APPLICATION,
        "route_prefix": "/",
        "import_path": "app.builder:build",
        "args": {"models": [model], "ingress": {"num_replicas": shape.num_ingresses}},
        "deployments": [{"name": INGRESS}],
    }
    return serve_config([application], port)


def serve_and_load(scenario: Scenario, shape: Shape, coming: Sequence[Coming], seed: int) -> dict[str, Any]:
    """What a real application makes of the scenario."""
    load_before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(config_of(shape, free_port()), Path(folder)) as address,
    ):
        clients = Clients(urlsplit(address), shape, seed, retries=scenario.retries)
        tries = uvloop.run(clients.run(coming))
    memory = {pid: summary_of_memory(samples, scenario) for pid, samples in clients.memory.items()}
    found = summary(scenario, shape, tries)
    return {
        **found,
        "ingress_memory_mib": list(memory.values()),
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }


class Clients:
    """Everybody who asks."""

    def __init__(self, url: SplitResult, shape: Shape, seed: int, *, retries: bool) -> None:
        self._url = url
        self._shape = shape
        self._draw = random.Random(seed)
        self._retries = retries
        self._pool = ConnectionPool(url)
        self._began_s = 0.0
        self.tries: list[Try] = []
        self.memory: dict[int, list[tuple[float, float]]] = {}

    async def run(self, coming: Sequence[Coming]) -> list[Try]:
        """All of them, until the last has its answer."""
        warm_up = [Coming(-1 - number, 0.0, "", "warm-up", 16, 4) for number in range(2 * self._shape.num_replicas)]
        for one in warm_up:
            await self._pool.exchange(self._payload(one), StreamRecord(0.0))
        self._began_s = time.perf_counter()
        watching = asyncio.ensure_future(self._watch_memory())
        try:
            async with asyncio.TaskGroup() as group:
                for one in coming:
                    await asyncio.sleep(max(0.0, self._began_s + one.due_s - time.perf_counter()))
                    group.create_task(self._ask(one))
        finally:
            watching.cancel()
            self._pool.close()
        return self.tries

    async def _ask(self, coming: Coming) -> None:
        payload = self._payload(coming)
        asked = await self._try(coming, 0, payload)
        after_s = asked.retry_after_s
        if self._retries and after_s is not None and after_s <= self._shape.patience_s:
            await asyncio.sleep(after_s + jitter_s(self._draw, after_s))
            await self._try(coming, 1, payload)

    async def _try(self, coming: Coming, attempt: int, payload: bytes) -> Try:
        now = time.perf_counter()
        asked = Try(coming, attempt, now - self._began_s)
        self.tries.append(asked)
        record = StreamRecord(now)
        await self._pool.exchange(payload, record)
        asked.end_s = record.end_s - self._began_s if record.end_s else None
        if record.error is None:
            asked.ttft_s = record.ttft_s
        elif record.retry_after_s is not None:
            asked.retry_after_s, asked.refusal = record.retry_after_s, record.error
        else:
            asked.error = record.error
        return asked

    def _payload(self, coming: Coming) -> bytes:
        draw = random.Random(coming.number)
        body: dict[str, object] = {
            "model": MODEL,
            "prompt": [_FIRST_TOKEN + draw.randrange(_NUM_TOKENS) for _ in range(coming.prompt_tokens)],
            "max_tokens": coming.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return completion_request(self._url, body, headers={TENANT_HEADER: coming.tenant})

    async def _watch_memory(self) -> None:
        while True:
            now = time.perf_counter() - self._began_s
            for pid, mib in ingress_memory().items():
                self.memory.setdefault(pid, []).append((now, mib))
            await asyncio.sleep(_MEMORY_INTERVAL_S)


def ingress_memory() -> dict[int, float]:
    """Resident memory of each ingress replica on this machine, in MiB."""
    found: dict[int, float] = {}
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or f":{APPLICATION}:{INGRESS}".encode() not in (
                (folder / "cmdline").read_bytes()
            ):
                continue
            pages = int((folder / "statm").read_text().split()[1])
        except OSError:
            continue  # it has ended meanwhile
        found[int(folder.name)] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return found


def summary_of_memory(samples: Sequence[tuple[float, float]], scenario: Scenario) -> dict[str, float]:
    """An ingress's memory at the end of each phase, and at most."""
    found = {"most": round(max(mib for _, mib in samples), 1)}
    end_s = 0.0
    for phase in scenario.phases:
        end_s += phase.seconds
        before = [mib for at_s, mib in samples if at_s <= end_s]
        if before:
            found[phase.name] = round(before[-1], 1)
    return found
