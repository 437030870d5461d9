"""Routers compared on a real Serve application: simulated devices, everything else as in production.

    python -m benchmarks.fleet --trace FILE --replicas 4 --ingresses 2 --blocks 8000 --prefill-rate 12000
        [--router NAME ...] [--limit N] [--scale X] [--speed X] [--hold-ms MS] [--out FILE]

For each router an application of its own is started and a piece of the trace (Mooncake's format) is replayed over HTTP:
policies of app.balancer by their names, `ray_power_of_two` (Serve's default) and `ray_prefix_aware` (ray.serve.llm's,
given a text of one character a token). Blocks, prefill rate and all results are in the trace's units, as
benchmarks.routing has them, which also says what its simulated fleet makes of the same arrivals. `--out` keeps results
of earlier calls. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from app.balancer import POLICIES, make_policy
from benchmarks.cpu.options import positive
from benchmarks.fleet.report import markdown, ratios, replay_summary
from benchmarks.fleet.server import MODEL, RAY_ROUTERS, fleet_config, free_port, serving
from benchmarks.fleet.workload import FleetShape, due_times, scaled_request
from benchmarks.routing.replica import ReplicaModel
from benchmarks.routing.report import summary
from benchmarks.routing.simulation import FleetSetup, Simulation
from benchmarks.routing.trace import Arrival, arrivals, ideal_hit_rate, read_trace
from benchmarks.serving.client import completion_request
from benchmarks.serving.load import Load, run_load

# What the simulated fleet can answer for Ray's routers: the same rules, as app.balancer.baselines has them.
_SIMULATED_AS = {"ray_power_of_two": "power_of_two", "ray_prefix_aware": "prefix_threshold"}
_WARM_UP = 8


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    shape = FleetShape(
        args.replicas, args.ingresses, args.blocks, args.prefill_rate, args.scale, args.speed, args.step_ms / 1e3
    )
    trace = read_trace(args.trace)[: args.limit]
    coming = arrivals(trace, args.jitter_ms, args.seed)
    result: dict[str, Any] = {"replays": {}, "simulated": {}}
    if args.out is not None and args.out.exists():
        result = json.loads(args.out.read_text())
    settings = {key: value for key, value in vars(args).items() if key not in ("trace", "router", "out", "hold_ms")}
    settings |= {"trace": args.trace.name, "requests": len(trace), "ideal_hit_rate": round(ideal_hit_rate(trace), 4)}
    if result.setdefault("settings", settings) != settings:
        raise SystemExit(f"{args.out} has results with other settings: {result['settings']}")
    for router in args.router:
        name = router if args.hold_ms is None else f"{router}, hold_ms {args.hold_ms:g}"
        result["replays"][name] = entry = _replay(shape, router, args.hold_ms, coming)
        result["simulated"][name] = simulated = _simulate(shape, router, args.hold_ms, coming)
        entry["ratio_to_simulated"] = ratios(entry, simulated)
        print(f"{name}: {json.dumps(entry)}", flush=True)
    print(markdown(result["replays"]))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": "fleet", **result}))


def _replay(shape: FleetShape, router: str, hold_ms: float | None, coming: list[Arrival]) -> dict[str, Any]:
    requests = [scaled_request(arrival, shape) for arrival in coming]
    load_before = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(fleet_config(shape, router, hold_ms, free_port()), Path(folder)) as address,
    ):
        url = urlsplit(address)
        # Not of the trace: their blocks are found by nobody.
        warm_up = [[2] * shape.block_size] * _WARM_UP
        uvloop.run(run_load(url, Load([completion_request(url, _body(prompt, 4)) for prompt in warm_up], 4)))
        payloads = [completion_request(url, _body(request.prompt, request.num_output_tokens)) for request in requests]
        began = time.perf_counter()
        records = uvloop.run(run_load(url, Load(payloads, 1, due_times(coming, shape.speed))))
        seconds = time.perf_counter() - began
    entry = replay_summary(requests, records, shape.speed)
    return {
        **entry,
        "replay_s": round(seconds, 1),
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }


def _body(prompt: Sequence[int], num_output_tokens: int) -> dict[str, object]:
    return {
        "model": MODEL,
        "prompt": list(prompt),
        "max_tokens": num_output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _simulate(shape: FleetShape, router: str, hold_ms: float | None, coming: list[Arrival]) -> dict[str, Any]:
    """The same arrivals in benchmarks.routing's fleet."""
    policy = _SIMULATED_AS.get(router, router)
    # A token of the trace is 1 / scale of a token of the replay, which takes a step.
    token_s = shape.step_s * shape.speed * shape.scale
    model = ReplicaModel(shape.num_blocks, shape.prefill_tokens_per_s, token_s)
    hold_s = None if hold_ms is None else hold_ms / 1e3 * shape.speed
    setup = FleetSetup(shape.num_replicas, model, 0.0, shape.num_ingresses, hold_s)
    return {"policy": policy, **summary(Simulation(setup, partial(make_policy, policy)).run(coming))}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--trace", type=Path, required=True, help="a trace in Mooncake's format")
    parser.add_argument("--limit", type=positive, default=1200, help="requests replayed, from the beginning")
    parser.add_argument("--replicas", type=positive, default=4)
    parser.add_argument("--ingresses", type=positive, default=2)
    parser.add_argument("--blocks", type=positive, default=8000, help="KV blocks of 512 tokens a replica")
    parser.add_argument("--prefill-rate", type=float, default=12000.0, help="prompt tokens a second of a replica")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of a decode step, in the replay's own time")
    parser.add_argument("--scale", type=float, default=1 / 16, help="of lengths and blocks")
    parser.add_argument("--speed", type=float, default=3.0, help="of the trace's clock")
    parser.add_argument("--jitter-ms", type=float, default=3000.0, help="timestamps are moved by up to this")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    parser.add_argument("--hold-ms", type=float, help="balancer.hold_ms of the policies that are Quire's")
    parser.add_argument("--out", type=Path, help="a JSON file that results are added to")
    names = [*POLICIES, *RAY_ROUTERS]
    default = ["cheapest", *RAY_ROUTERS]
    parser.add_argument("--router", nargs="+", choices=names, default=default, metavar="NAME", help=", ".join(names))
    args = parser.parse_args(arguments)
    for name in ("prefill_rate", "step_ms", "scale", "speed"):
        if getattr(args, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, is {getattr(args, name)}")
    if args.hold_ms is not None and any(name in RAY_ROUTERS for name in args.router):
        parser.error("--hold-ms is of Quire's balancer; give Ray's routers in a call of their own")
    return args


if __name__ == "__main__":
    main()
