"""What the ratios of Fig. 12 and 14 rest on: the host's cost of a step and of a sequence; the length of the trace."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome, Row
from benchmarks.paper.runs import Run, Workload
from benchmarks.paper.saturation import Overload, Saturation, saturate
from benchmarks.paper.setups import OPT_13B, OPT_66B, OPT_175B, ORCA_MAX, ORCA_ORACLE, PAGED, Setup
from benchmarks.paper.sweep import sweep
from engine.execution.hardware import Hardware, find_hardware

_SETUPS = (OPT_13B, OPT_66B, OPT_175B)
_SYSTEMS = (PAGED, ORCA_ORACLE, ORCA_MAX)
_PAPER = {ORCA_ORACLE.name: (1.7, 2.7), ORCA_MAX.name: (2.7, 8.0)}
# Milliseconds a step and a sequence: the hardware table's, three that cost as much for 132 sequences, each part alone.
_COSTS = (
    (30.0, 0.118),
    (10.0, 0.27),
    (20.0, 0.194),
    (45.6, 0.0),
    (0.0, 0.118),
    (60.0, 0.118),
    (30.0, 0.0),
    (30.0, 0.236),
)
# Fig. 14's cases, over Orca (Oracle): sequences of a request, whether they are beams, and the paper's ratio.
_SHARING = ((1, False, 1.3), (6, True, 2.3))
_LENGTH_SETUP = OPT_66B  # the one with the fewest tokens a second, so the cheapest to simulate for long
_LENGTHS_S = (100.0, 300.0)
_QUICK_LENGTHS_S = (60.0,)


class _Length(NamedTuple):
    """A trace's length, and the rates that paging and Orca (Oracle) sustain over it."""

    seconds: float
    paged: float
    oracle: float


class _LengthJob(NamedTuple):
    run: Run
    saturated_rate: float


def run(context: Context) -> Outcome:
    workload = Workload("ShareGPT", context.sharegpt)
    setups = (_LENGTH_SETUP,) if context.scale.quick else _SETUPS
    overloads = [Overload(setup, system, workload) for setup in setups for system in _SYSTEMS]
    measured = {
        (item.setup.title, item.system.name): saturation
        for item, saturation in zip(overloads, context.map(saturate, overloads), strict=True)
    }
    rows = [row for setup in setups for row in _machine_rows(setup.title, find_hardware(setup.hardware), measured)]
    ratios: dict[str, dict[str, float]] = {}
    for step_ms, sequence_ms in _COSTS:
        for setup in setups:
            hardware = _priced(setup, step_ms, sequence_ms)
            rates = {system.name: measured[setup.title, system.name].rate(hardware) for system in _SYSTEMS}
            for system in _SYSTEMS[1:]:
                ratio = rates[PAGED.name] / rates[system.name]
                cost = f"{step_ms:g} ms a step, {sequence_ms:g} ms a sequence"
                name = f"{setup.title}: paged over {system.title}"
                ratios.setdefault(name, {})[cost] = ratio
                note = f"paged {rates[PAGED.name]:.3g} requests/s"
                rows.append(Row(f"{name}, {cost}", "x", ratio, _PAPER[system.name], note))
    rows += _sharing_rows(context)
    lengths = _lengths(context, workload, measured)
    rows += [
        Row(
            f"{_LENGTH_SETUP.title}, sustained over {item.seconds:g} s: paged over {ORCA_ORACLE.title}",
            "x",
            item.paged / item.oracle if item.oracle else None,
            _PAPER[ORCA_ORACLE.name],
            f"{item.paged:.3g} and {item.oracle:.3g} requests/s",
        )
        for item in lengths
    ]
    notes = [
        SIMULATED,
        workload.description,
        "Saturated rates: under overload the batch does not depend on how long steps last, so one run's steps are",
        "priced under every cost. The first cost is the hardware table's; the next three cost as much for the 132",
        "sequences of Fig. 13; the others change one part alone.",
    ]
    data: dict[str, Any] = {"ratios": ratios, "trace_lengths": [item._asdict() for item in lengths]}
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, ratios))


def _priced(setup: Setup, step_ms: float, sequence_ms: float) -> Hardware:
    return dataclasses.replace(find_hardware(setup.hardware), step_s=1e-3 * step_ms, sequence_s=1e-3 * sequence_ms)


def _sharing_rows(context: Context) -> list[Row]:
    """Fig. 14's first and last case under each cost: the less a sequence costs, the more sharing gains."""
    cases = _SHARING[:1] if context.scale.quick else _SHARING
    systems = (PAGED, ORCA_ORACLE)
    overloads = [
        Overload(OPT_13B, system, Workload("Alpaca", context.alpaca, num_sequences=count, beam=beam))
        for count, beam, _ in cases
        for system in systems
    ]
    measured = context.map(saturate, overloads)
    rows = []
    for (count, beam, paper), paged, oracle in zip(cases, measured[::2], measured[1::2], strict=True):
        name = (
            f"{OPT_13B.title}, Alpaca, {f'{count} beams' if beam else 'one sequence'}: paged over {ORCA_ORACLE.title}"
        )
        for step_ms, sequence_ms in _COSTS:
            hardware = _priced(OPT_13B, step_ms, sequence_ms)
            ratio = paged.rate(hardware) / oracle.rate(hardware)
            rows.append(Row(f"{name}, {step_ms:g} ms a step, {sequence_ms:g} ms a sequence", "x", ratio, paper))
    return rows


def _machine_rows(title: str, hardware: Hardware, measured: dict[tuple[str, str], Saturation]) -> list[Row]:
    rows = []
    for system in _SYSTEMS:
        item = measured[title, system.name]
        parts = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in item.parts(hardware).items())
        rows.append(
            Row(
                f"{title}, {system.title}, saturated: a step",
                "ms",
                1e3 * item.step_s(hardware),
                note=f"{item.num_batched:.1f} requests batched; {parts}; arithmetic is "
                f"{item.arithmetic_share(hardware):.0%} of the matrix products' bound",
            )
        )
    return rows


def _lengths(context: Context, workload: Workload, measured: dict[tuple[str, str], Saturation]) -> list[_Length]:
    hardware = find_hardware(_LENGTH_SETUP.hardware)
    seconds = _QUICK_LENGTHS_S if context.scale.quick else _LENGTHS_S
    jobs = [
        _LengthJob(
            Run(_LENGTH_SETUP, system, workload, rate=0.0, duration_s=duration_s),
            measured[_LENGTH_SETUP.title, system.name].rate(hardware),
        )
        for duration_s in seconds
        for system in (PAGED, ORCA_ORACLE)
    ]
    rates = context.map(_sustained, jobs)
    return [_Length(*item) for item in zip(seconds, rates[::2], rates[1::2], strict=True)]


def _sustained(job: _LengthJob) -> float:
    return sweep(job.run, job.saturated_rate, (0.9, 1.1, 1.3)).sustained_rate


def _draw(drawing: Drawing, ratios: dict[str, dict[str, float]]) -> None:
    drawing.set_size_inches(10, 4)
    for index, system in enumerate(_SYSTEMS[1:]):
        axes = drawing.add_subplot(1, 2, index + 1)
        axes.axhspan(*_PAPER[system.name], color="lightgrey", label="the paper's range")
        for name, values in ratios.items():
            if name.endswith(system.title):
                axes.plot(range(len(values)), list(values.values()), "o", label=name.split(":")[0])
        axes.set_xticks(range(len(_COSTS)), [f"{step:g}\n{sequence:g}" for step, sequence in _COSTS])
        axes.set(title=f"paged over {system.title}", xlabel="ms a step, ms a sequence", ylim=(0, None))
        axes.legend(fontsize="small")


FIGURE = Figure("sensitivity", "What Fig. 12's and 14's ratios rest on", run, simulated="A100s as the paper ran them")
