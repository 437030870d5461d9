"""Balancing policies compared on a simulated fleet, around the balancer's own code.

    python -m benchmarks.routing --trace FILE --replicas 8 --blocks 4000 --prefill-rate 6000 --tpot-ms 20

The trace is of Mooncake's format: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length` and
`hash_ids` of 512-token blocks. All policies see the same arrivals. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path

from app.balancer import POLICIES, make_policy
from benchmarks.routing.replica import ReplicaModel
from benchmarks.routing.report import summary, table
from benchmarks.routing.simulation import FleetSetup, Simulation
from benchmarks.routing.trace import arrivals, ideal_hit_rate, read_trace


def main() -> None:
    """Parse, simulate, print."""
    args = _arguments()
    trace = read_trace(args.trace)[: args.limit]
    model = ReplicaModel(args.blocks, args.prefill_rate, args.tpot_ms / 1000.0)
    requests = arrivals(trace, args.jitter_ms, args.seed, args.copies)
    ideal = ideal_hit_rate(trace)
    # Millions of requests that stay: looking through them for garbage would be most of the time.
    gc.freeze()
    results = {}
    for name in args.policy:
        began = time.perf_counter()
        # Holding back is part of the default policy; the others are what their authors made them.
        hold_s = args.hold_ms / 1000.0 if name == "cheapest" and args.hold_ms >= 0 else None
        setup = FleetSetup(args.replicas, model, args.staleness_ms / 1000.0, args.ingresses, hold_s)
        results[name] = summary(Simulation(setup, partial(make_policy, name)).run(requests))
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(f"{len(requests)} requests, ideal hit rate {ideal:.4f}")
    print(table(results))
    settings = {key: value for key, value in vars(args).items() if key not in ("trace", "policy")}
    print(json.dumps({"trace": args.trace.name, **settings, "ideal_hit_rate": round(ideal, 4), "policies": results}))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trace", type=Path, required=True, help="a trace in Mooncake's format")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4000, help="KV blocks of 512 tokens a replica")
    parser.add_argument("--prefill-rate", type=float, default=6000.0, help="prompt tokens a second")
    parser.add_argument("--tpot-ms", type=float, default=20.0, help="between two output tokens")
    parser.add_argument("--jitter-ms", type=float, default=3000.0, help="timestamps are moved by up to this")
    parser.add_argument("--seed", type=int, default=0, help="of the jitter")
    parser.add_argument("--copies", type=int, default=1, help="of the trace, at once, that share no blocks")
    parser.add_argument("--limit", type=int, default=None, help="only so many requests, the trace's first")
    parser.add_argument("--staleness-ms", type=float, default=0.0, help="age of what replicas tell")
    parser.add_argument("--ingresses", type=int, default=1, help="each with its own balancer")
    parser.add_argument(
        "--hold-ms", type=float, default=0.0, help="`cheapest` holds longer waits back; negative: never"
    )
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES), metavar="NAME")
    args = parser.parse_args()
    for name in ("replicas", "blocks", "prefill_rate", "copies", "ingresses"):
        if getattr(args, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, is {getattr(args, name)}")
    if args.limit is not None and args.limit <= 0:
        parser.error(f"argument --limit: must be positive, is {args.limit}")
    return args


if __name__ == "__main__":
    main()
