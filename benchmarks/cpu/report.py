"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cpu.decode import DecodeResult
from benchmarks.cpu.machine import MachineRates
from benchmarks.cpu.peers import EngineRun


def machine_lines(measured: Sequence[MachineRates]) -> Iterator[str]:
    for rates in measured:
        products = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.operations_per_s.items())
        yield (
            f"{rates.num_threads} threads: memory read {rates.bytes_per_s / 1e9:.1f} GB/s; "
            f"multiplications and additions, 10^9/s: {products}"
        )


def engine_lines(ours: EngineRun, peers: Sequence[EngineRun]) -> Iterator[str]:
    """A line an engine, with our medians over its own."""
    yield f"{'engine':24} {'output tok/s':>24} {'ours/':>7} {'one stream':>11} {'ours/':>7} {'load s':>7}"
    for run in (ours, *peers):
        spread = f"{run.batch:.1f} ({min(run.out_tok_s):.0f} to {max(run.out_tok_s):.0f})"
        load = "" if run.load_s is None else f"{run.load_s:.1f}"
        yield (
            f"{run.name:24} {spread:>24} {ours.batch / run.batch:7.2f} {run.single:11.1f} "
            f"{ours.single / run.single:7.2f} {load:>7}"
        )


def phase_lines(what: str, phases: Mapping[str, float], floor: Mapping[str, float], unit: str) -> Iterator[str]:
    """Where the seconds of a run ("s") or of a step ("ms") go, beside the roofline's where it has the phase."""
    scale = 1e3 if unit == "ms" else 1.0
    total, least = sum(phases.values()), sum(floor.values())
    yield f"{what:30} {unit:>9} {'share':>7} {'roofline':>9} {'ratio':>6}"
    for name, seconds in (*phases.items(), ("all", total)):
        bound = least if name == "all" else floor.get(name, 0.0)
        compared = f"{bound * scale:9.3f} {seconds / bound:6.2f}" if bound else ""
        yield f"  {name:28} {seconds * scale:9.3f} {seconds / total:7.1%} {compared}".rstrip()


def decode_lines(result: DecodeResult) -> Iterator[str]:
    case = result.case
    yield from phase_lines(f"decode step, {case.batch} x {case.context}", result.phases, result.floor, "ms")
    ratio = "" if result.floor_ratio is None else f", {result.floor_ratio:.2f} x the roofline"
    for number, rates in enumerate(result.machine, 1):
        yield f"  reading {number} of {len(result.machine)}: {next(machine_lines([rates]))}"
    yield f"  median step {result.step_s * 1e3:.3f} ms{ratio}; Python's share {result.python_share:.1%}"


def decode_json(result: DecodeResult) -> dict[str, object]:
    return {
        **result.case._asdict(),
        "step_ms": round(result.step_s * 1e3, 4),
        "phases_ms": {name: round(seconds * 1e3, 4) for name, seconds in result.phases.items()},
        "roofline_ms": {name: round(seconds * 1e3, 4) for name, seconds in result.floor.items()},
        "machine": [rates.as_json() for rates in result.machine],
        "roofline_ratio": None if result.floor_ratio is None else round(result.floor_ratio, 3),
        "python_share": round(result.python_share, 4),
    }
