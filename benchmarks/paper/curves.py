"""Panels of latency curves: several systems on one workload, as Fig. 12, 14, 16 and 17 show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Context, Row
from benchmarks.paper.runs import Run, Workload
from benchmarks.paper.saturation import Overload, saturated_rate
from benchmarks.paper.setups import PAGED, Setup, System
from benchmarks.paper.sweep import CHART_BOUND_S, SUSTAINED_BOUND_S, Curve, sweep

Ratio = float | tuple[float, float] | None


class Cell(NamedTuple):
    """A panel to be measured. `duration_share`: of the scale's duration, how long requests arrive."""

    setup: Setup
    workload: Workload
    systems: Sequence[System]
    duration_share: float = 1.0

    @property
    def title(self) -> str:
        return f"{self.setup.title}, {self.workload.name}"


class Panel(NamedTuple):
    """A panel with its curves, by the systems' names."""

    cell: Cell
    curves: Mapping[str, Curve]


class _Job(NamedTuple):
    run: Run
    rate_shares: tuple[float, ...]


def _sweep(job: _Job) -> Curve:
    run = job.run
    return sweep(run, saturated_rate(Overload(run.setup, run.system, run.workload, run.seed)), job.rate_shares)


def measure_panels(context: Context, cells: Sequence[Cell]) -> list[Panel]:
    """Sweep all curves of all panels; each curve is one piece of work for the processes."""
    jobs = [
        _Job(
            Run(cell.setup, system, cell.workload, rate=0.0, duration_s=_duration(context, cell)),
            context.scale.rate_shares,
        )
        for cell in cells
        for system in cell.systems
    ]
    curves = iter(context.map(_sweep, jobs))
    return [Panel(cell, {system.name: next(curves) for system in cell.systems}) for cell in cells]


def _duration(context: Context, cell: Cell) -> float:
    return context.scale.duration_s * cell.duration_share


def ratio_rows(panel: Panel, paper: Mapping[str, Ratio]) -> list[Row]:
    """What paging serves, and how many times each baseline's rate that is; `paper`: its ratios by system.

    Twice: with requests always waiting, which is what ever longer traces come to, and as sustained over the trace.
    """
    rows = []
    for what, unit, rates in (
        ("saturated", "requests/s", {name: curve.saturated_rate for name, curve in panel.curves.items()}),
        ("sustained", "requests/s", {name: curve.sustained_rate for name, curve in panel.curves.items()}),
    ):
        paged = rates[PAGED.name]
        rows.append(Row(f"{panel.cell.title}: {PAGED.title}, {what}", unit, paged))
        for system in panel.cell.systems:
            if system.name == PAGED.name:
                continue
            rate = rates[system.name]
            title = f"{panel.cell.title}: paged over {system.title}, {what}"
            ratio = paged / rate if rate else None
            rows.append(Row(title, "x", ratio, paper.get(system.name), f"{system.title}: {rate:.3g} requests/s"))
    return rows


def panel_data(panels: Sequence[Panel]) -> dict[str, Any]:
    return {
        panel.cell.title: {
            name: {
                "saturated_rate": curve.saturated_rate,
                "sustained_rate": curve.sustained_rate,
                "runs": [item.as_json() for item in curve.results],
            }
            for name, curve in panel.curves.items()
        }
        for panel in panels
    }


def sweep_notes(context: Context, panels: Sequence[Panel]) -> list[str]:
    durations = sorted({_duration(context, panel.cell) for panel in panels}, reverse=True)
    return [
        *dict.fromkeys(panel.cell.workload.description for panel in panels),
        f"Poisson arrivals for {' or '.join(f'{item:g}' for item in durations)} simulated seconds.",
        "Saturated: what a system serves while requests always wait, which is what ever longer traces come to.",
        f"Sustained: the mean normalized latency of the trace is at most {SUSTAINED_BOUND_S} s a token. A short trace",
        "is sustained beyond saturation, since its last requests still wait when the first have long been answered,",
        "and its rates depend on which requests come first: see the figure `sensitivity`.",
    ]


def draw_panels(drawing: Drawing, panels: Sequence[Panel], num_columns: int) -> None:
    num_rows = -(-len(panels) // num_columns)
    drawing.set_size_inches(4.5 * num_columns, 3.2 * num_rows + 0.4)
    for index, panel in enumerate(panels):
        axes = drawing.add_subplot(num_rows, num_columns, index + 1)
        for system in panel.cell.systems:
            points = [item for item in panel.curves[system.name].results if not item.exceeded]
            rates, latencies = [item.rate for item in points], [item.normalized_latency for item in points]
            axes.plot(rates, latencies, marker=".", label=system.title, color=system.colour)
        axes.axhline(SUSTAINED_BOUND_S, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=panel.cell.title, xlabel="requests/s", ylabel="normalized latency (s/token)")
        axes.set(ylim=(0, CHART_BOUND_S), xlim=(0, None))
    drawing.axes[0].legend(fontsize="small")
