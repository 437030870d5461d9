"""How long the first answer from zero takes, over HTTP: `python -m benchmarks.elastic.wake [--config FILE]`.

Serves a config's first model with a short idle time, lets it go to zero again and again, and asks. The controller's log
splits each time: until Serve starts a replica, until its process runs and Serve finds it ready, until the answer. The
last line is one JSON object; times of a machine that does other work besides say little.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import yaml

from app.config import engine_deployment_name
from benchmarks.cpu.options import positive
from benchmarks.elastic.server import ElasticServer, elastic_serving
from benchmarks.fleet.server import free_port

_CONFIG = Path(__file__).parents[2] / "serve_configs" / "autoscaling.yaml"
_ZERO_TIMEOUT_S = 40.0


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    config = yaml.safe_load(args.config.read_text())
    config["http_options"]["port"] = free_port()
    model = config["applications"][0]["args"]["models"][0]
    model["deployment"]["autoscaling"] |= {"min_replicas": 0, "idle_to_zero_s": 3.0, "downscale_delay_s": 1.0}
    load_before = os.getloadavg()[0]
    # Ray puts sockets there, whose paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="qe", dir="/tmp", ignore_cleanup_errors=True) as folder,
        elastic_serving(config, Path(folder), 0, engine_deployment_name(model["id"])) as server,
    ):
        wakes = [_wake(server, model["id"]) for _ in range(args.times)]
    result = {
        "benchmark": "elastic.wake",
        "config": args.config.name,
        "model": model["id"],
        "wakes": wakes,
        "longest_s": max(wake["answer_s"] for wake in wakes),
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }
    print(json.dumps(result))


def _wake(server: ElasticServer, model_id: str) -> dict[str, Any]:
    """One request while no replica runs, and then a wait until none runs again."""
    body = {"model": model_id, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    headers = {"content-type": "application/json"}
    asked_s = time.time()
    with urlopen(Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers), timeout=120) as response:
        answer = json.load(response)
    answered_s = time.time()
    life = server.log().lives[-1]
    wake = {
        "answer_s": round(answered_s - asked_s, 2),
        "until_started_s": round(life.asked_s - asked_s, 2),
        "until_ready_s": round(life.ready_s - life.asked_s, 2),
        "until_answer_s": round(answered_s - life.ready_s, 2),
        "tokens": answer["usage"]["completion_tokens"],
    }
    print(json.dumps(wake), flush=True)
    if not server.wait_for_zero(_ZERO_TIMEOUT_S):
        raise RuntimeError(f"the model did not go to zero within {_ZERO_TIMEOUT_S:g} s")
    return wake


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.elastic.wake", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--config", type=Path, default=_CONFIG, help="a Serve config whose first model autoscales")
    parser.add_argument("--times", type=positive, default=4)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
