"""Admission under overload, in discrete events and on a real Serve application with simulated devices.

    python -m benchmarks.overload [--scenario overload flood] [--simulated-only] [--replicas N] [--ingresses N]
        [--prefill-rate X] [--step-ms X] [--seats N] [--ttft-s X] [--factor X] [--seconds X] [--out FILE]

`overload`: for `--seconds` requests come at `--factor` times what the fleet can do, before and after it at
`--normal-load` times. The refused come again once when they were told to, and up to a second and a tenth of that later,
unless it is longer than `--patience`. `flood`: a calm tenant asks for a fifth of the fleet, by itself, beside a tenant
with which the load is 0.8, and beside one that floods; nobody comes again. All requests have one deadline, `--ttft-s`.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.options import positive
from benchmarks.overload.real import serve_and_load
from benchmarks.overload.scenarios import Scenario, Shape, capacity, coming_of, flood, overload, simulate
from benchmarks.overload.workload import Lengths

_SHARED_LOAD = 0.8


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, simulate, serve, print."""
    args = _parse(arguments)
    shape = Shape(
        *(args.replicas, args.ingresses, args.prefill_rate, args.step_ms / 1e3, args.seats),
        # A step full of prompt lasts no longer than one that only decodes.
        step_tokens=max(round(args.prefill_rate * args.step_ms / 1e3), 16),
        ttft_s=args.ttft_s,
        lengths=Lengths((64, 512), (16, 64)),
        patience_s=args.patience,
    )
    scenarios = {
        "overload": overload(args.factor, args.normal_load, args.seconds),
        "flood": flood(args.factor, _SHARED_LOAD, args.seconds),
    }
    requests_per_s = capacity(shape, args.seed)
    result: dict[str, Any] = {
        "benchmark": "overload",
        "settings": {key: value for key, value in vars(args).items() if key not in ("out", "scenario")},
        "capacity_requests_per_s": round(requests_per_s, 2),
    }
    runners: dict[str, Callable[[Scenario, Shape, Any, int], dict[str, Any]]] = {"simulated": simulate}
    if not args.simulated_only:
        runners["real"] = serve_and_load
    for name in args.scenario:
        scenario = scenarios[name]
        coming = coming_of(scenario, shape, requests_per_s, args.seed)
        for kind, run in runners.items():
            result.setdefault(name, {})[kind] = entry = run(scenario, shape, coming, args.seed)
            for part, value in entry.items():
                print(f"{name}, {kind}, {part}: {json.dumps(value)}", flush=True)
    line = json.dumps(result)
    if args.out is not None:
        args.out.write_text(line + "\n")
    print(line)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=(__doc__ or "").split("\n", 1)[0]
    )
    names = ["overload", "flood"]
    parser.add_argument("--scenario", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--simulated-only", action="store_true", help="in discrete events alone")
    parser.add_argument("--replicas", type=positive, default=4)
    parser.add_argument("--ingresses", type=positive, default=2)
    parser.add_argument("--prefill-rate", type=float, default=1500.0, help="prompt tokens a second of a replica")
    parser.add_argument("--step-ms", type=float, default=40.0, help="of a decode step")
    parser.add_argument("--seats", type=positive, default=32, help="sequences that a replica runs at once")
    parser.add_argument("--ttft-s", type=float, default=2.0, help="every request's deadline")
    parser.add_argument("--factor", type=float, default=4.0, help="of the fleet's capacity")
    parser.add_argument("--normal-load", type=float, default=0.5, help="of the fleet's capacity")
    parser.add_argument("--seconds", type=float, default=60.0, help="of a phase")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds; who is told to wait longer gives up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the last line")
    args = parser.parse_args(arguments)
    for name in ("prefill_rate", "step_ms", "ttft_s", "factor", "normal_load", "seconds", "patience"):
        if getattr(args, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, is {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
