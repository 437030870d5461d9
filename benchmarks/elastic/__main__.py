"""Autoscaling on a real Serve application: a load that rises, bursts and falls, on simulated devices.

    python -m benchmarks.elastic [--policy quire ray:8 ray-quick:8 fixed:4 ...] [--trace FILE] [--simulate-only]
        [--out FILE] [--plot FILE]

Policies: `quire`, this project's; `ray:T`, Serve's default one with target_ongoing_requests T, upscale delay 0 and its
own intervals of metrics (it knows what was the case 10 to 40 s ago); `ray-quick:T`, the same with metrics every 0.5 s,
averaged over 2 s, as quire has them; `fixed:N`. All have the same bounds and the same delays for going down. Each is
also simulated, over several seeds of arrivals. The least replica-seconds are those of benchmarks.elastic.least.
`--out` keeps the results of earlier calls; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvloop

from app.autoscaling.sizing import SizingRules
from benchmarks.cpu.options import positive
from benchmarks.elastic.controllers import FixedController, RayController, RayOptions, SizerController
from benchmarks.elastic.least import Least, least_replica_s
from benchmarks.elastic.plot import draw
from benchmarks.elastic.report import Run, summary, timeline
from benchmarks.elastic.server import elastic_config, elastic_serving
from benchmarks.elastic.simulation import Controller, ElasticSimulation, Timing
from benchmarks.elastic.workload import SHAPE, ElasticRequest, Lengths, Prices, shaped_load, traced_load
from benchmarks.fleet.server import MODEL
from benchmarks.serving.client import StreamRecord, completion_request
from benchmarks.serving.load import Load, run_load

# The ramp of four times within 30 s, and the plateau after it.
_WINDOW = (20.0, 66.0)
_LENGTHS = Lengths()
_PRICES = Prices()
# Delays are short, as is the load: what takes minutes in a day takes seconds here.
_RULES = SizingRules(
    min_replicas=0,
    max_replicas=4,
    downscale_delay_s=3.0,
    idle_to_zero_s=5.0,
    ttft_target_s=1.0,
    target_utilization=0.9,
    downscale_margin=0.05,
)
_QUICK = (0.5, 2.0)
_SEEDS = range(8)
# From the last answer until no replica is left.
_ZERO_TIMEOUT_S = 20.0


class Policy(NamedTuple):
    """A policy by its name on the command line.

    Attributes:
        deployment, ray_policy: as elastic_config takes them.
        initial_replicas: at the load's beginning.
        make: its counterpart in the simulation.
    """

    name: str
    deployment: dict[str, Any]
    ray_policy: dict[str, Any] | None
    initial_replicas: int
    make: Callable[[], Controller]


def policy_of(name: str) -> Policy:
    """Raises ValueError if there is none of that name."""
    kind, _, argument = name.partition(":")
    if name == "quire":
        return Policy(name, {"autoscaling": _RULES._asdict()}, None, 0, lambda: SizerController(_RULES))
    if kind == "fixed" and argument.isdigit() and int(argument) > 0:
        count = int(argument)
        return Policy(name, {"num_replicas": count}, None, count, lambda: FixedController(count))
    if kind in ("ray", "ray-quick"):
        options = RayOptions(float(argument), *(_QUICK if kind == "ray-quick" else ()))
        return Policy(name, {}, _ray_policy(options), 0, lambda: RayController(options, _RULES))
    raise ValueError(f"no policy {name!r}: quire, ray:T, ray-quick:T or fixed:N")


def _ray_policy(options: RayOptions) -> dict[str, Any]:
    return {
        "min_replicas": _RULES.min_replicas,
        "initial_replicas": 0,
        "max_replicas": _RULES.max_replicas,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": _RULES.downscale_delay_s,
        "downscale_to_zero_delay_s": _RULES.idle_to_zero_s,
        **options._asdict(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    # Ray's own settings, given as documented, are called deprecated.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    requests = _requests(args, args.seed)
    settings = {
        "device": _PRICES.device,
        "rules": _RULES._asdict(),
        "load": args.trace.name if args.trace else "shape",
        "requests": len(requests),
        "work_replica_s": round(sum(item.num_prompt for item in requests) / _PRICES.prefill_tokens_per_s, 1),
        "seed": args.seed,
    }
    result: dict[str, Any] = {"settings": settings, "runs": {}, "simulated": {}}
    if args.out is not None and args.out.exists():
        result = json.loads(args.out.read_text())
        if result["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{args.out} has results with other settings: {result['settings']}")
    least = _least(requests, args, result)
    for name in args.policy:
        policy = policy_of(name)
        result["simulated"][name] = _simulated(policy, args)
        print(f"simulated {name}: {json.dumps(result['simulated'][name])}", flush=True)
        if not args.simulate_only:
            _measure(policy, requests, least, args, result)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"benchmark": "elastic", **result}))


def _least(requests: list[ElasticRequest], args: argparse.Namespace, result: dict[str, Any]) -> Least | None:
    """Searched for once, and kept with the results."""
    if args.least and "least" not in result:
        found = least_replica_s(requests, _PRICES, _RULES.max_replicas, _RULES.ttft_target_s, args.start_s)
        result["least"] = {**found._asdict(), "start_s": args.start_s}
        print(f"least: {json.dumps(result['least'])}", flush=True)
    entry = result.get("least")
    return Least(entry["replica_s"], entry["numbers"], entry["period_s"]) if entry else None


def _measure(
    policy: Policy,
    requests: list[ElasticRequest],
    least: Least | None,
    args: argparse.Namespace,
    result: dict[str, Any],
) -> None:
    load_before = os.getloadavg()[0]
    run = _replay(policy, requests)
    entry = summary(run, _WINDOW)
    entry["load_average"] = [round(load_before, 1), round(os.getloadavg()[0], 1)]
    if least is not None:
        entry["over_least"] = round(entry["replica_s"] / least.replica_s, 3)
    result["runs"][policy.name] = entry
    print(f"{policy.name}: {json.dumps(entry)}", flush=True)
    entry["timeline"] = timeline(run)
    entry["decisions"] = [f"{at_s:.1f} s: {text}" for at_s, text in run.decisions]
    if args.plot is not None:
        _plot(args.plot, policy, run, least, entry)


def _plot(path: Path, policy: Policy, run: Run, least: Least | None, entry: dict[str, Any]) -> None:
    title = (
        f"{policy.name} on real Serve, SIMULATED devices ({_PRICES.device.partition(':')[2]}): "
        f"{entry['replica_s']:.0f} replica-seconds, first token p95 {entry['ttft_p95_s']} s"
    )
    draw(path, run, _PRICES, _RULES.ttft_target_s, least, title)


def _replay(policy: Policy, requests: Sequence[ElasticRequest]) -> Run:
    config = elastic_config(_PRICES, policy.deployment, policy.ray_policy)
    # Ray puts sockets there, whose paths must be short.
    with (
        tempfile.TemporaryDirectory(prefix="qe", dir="/tmp", ignore_cleanup_errors=True) as folder,
        elastic_serving(config, Path(folder), policy.initial_replicas) as server,
    ):
        url = urlsplit(server.url)
        rng = random.Random(len(requests))
        payloads = [completion_request(url, _body(request, rng)) for request in requests]
        began_s = time.time()
        records = uvloop.run(run_load(url, Load(payloads, 1, [request.due_s for request in requests])))
        if policy.ray_policy is not None or "autoscaling" in policy.deployment:
            server.wait_for_zero(_ZERO_TIMEOUT_S)
        ended_s, log = time.time(), server.log()
    return Run(
        requests,
        [record.ttft_s if record.error is None else math.inf for record in records],
        [_refused(record) for record in records],
        [
            (max(life.asked_s - began_s, 0.0), life.ready_s - began_s, min(life.gone_s, ended_s) - began_s)
            for life in log.lives
        ],
        [(at_s - began_s, text) for at_s, text in log.decisions],
    )


def _refused(record: StreamRecord) -> bool:
    return record.error is not None and record.error.startswith("status 429")


def _simulated(policy: Policy, args: argparse.Namespace) -> dict[str, Any]:
    """Means over several seeds; a trace has one order of arrivals."""
    entries = []
    for seed in [args.seed] if args.trace else _SEEDS:
        requests = _requests(args, seed)
        simulation = ElasticSimulation(_PRICES, policy.make(), Timing(args.start_s), policy.initial_replicas)
        outcome = simulation.run(requests, max(item.due_s for item in requests) + 30.0)
        entries.append(summary(Run(requests, outcome.ttft_s, [False] * len(requests), outcome.lives), _WINDOW))
    names = ("ttft_p95_s", "ramp_ttft_p95_s", "replica_s")
    return {name: round(sum(entry[name] for entry in entries) / len(entries), 3) for name in names}


def _requests(args: argparse.Namespace, seed: int) -> list[ElasticRequest]:
    if args.trace is not None:
        return traced_load(args.trace, args.limit, args.speed, args.scale, seed)
    return shaped_load(SHAPE, _PRICES, _LENGTHS, seed)


def _body(request: ElasticRequest, rng: random.Random) -> dict[str, object]:
    return {
        "model": MODEL,
        # Drawn, so that nothing is found in a prefix cache.
        "prompt": [rng.randrange(1000, 30000) for _ in range(request.num_prompt)],
        "max_tokens": request.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.elastic", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--policy", nargs="+", default=["quire", "fixed:4"], metavar="NAME", help="see above")
    parser.add_argument("--trace", type=Path, help="a trace in Mooncake's format, in place of the generated load")
    parser.add_argument("--limit", type=positive, default=400, help="requests of the trace, from its beginning")
    parser.add_argument("--speed", type=float, default=2.0, help="of the trace's clock")
    parser.add_argument("--scale", type=float, default=1 / 16, help="of the trace's lengths")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--start-s", type=float, default=3.0, help="what a replica's start takes in the simulation")
    parser.add_argument("--simulate-only", action="store_true", help="start no Serve")
    parser.add_argument("--no-least", dest="least", action="store_false", help="do not search for the least")
    parser.add_argument("--out", type=Path, help="a JSON file that results are added to")
    parser.add_argument("--plot", type=Path, help="a PNG of the last policy's run")
    args = parser.parse_args(arguments)
    for name in args.policy:
        try:
            policy_of(name)
        except ValueError as error:
            parser.error(f"argument --policy: {error}")
    return args


if __name__ == "__main__":
    main()
