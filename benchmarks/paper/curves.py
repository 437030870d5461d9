"""Panels of latency curves: several systems on one workload, as Fig. 12, 14, 16 and 17 show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Context, Row
from benchmarks.paper.runs import Run, Workload
from benchmarks.paper.setups import PAGED, Setup, System
from benchmarks.paper.sweep import CHART_BOUND_S, SUSTAINED_BOUND_S, Curve, sweep

# Where the search for the baselines' sustained rates starts, as a share of where it starts for paging.
_START_SHARES = {"paged": 1.0, "orca_oracle": 0.6, "orca_pow2": 0.4, "orca_max": 0.25, "static": 0.1}

Ratio = float | tuple[float, float] | None


class Cell(NamedTuple):
    """A panel to be measured. `start_rate`: a guess at what paging sustains, requests/s."""

    setup: Setup
    workload: Workload
    systems: Sequence[System]
    start_rate: float

    @property
    def title(self) -> str:
        return f"{self.setup.title}, {self.workload.name}"


class Panel(NamedTuple):
    """A panel with its curves, by the systems' names."""

    cell: Cell
    curves: Mapping[str, Curve]


class _Job(NamedTuple):
    run: Run
    start_rate: float
    num_bisections: int


def _sweep(job: _Job) -> Curve:
    return sweep(job.run, job.start_rate, job.num_bisections)


def measure_panels(context: Context, cells: Sequence[Cell]) -> list[Panel]:
    """Sweep all curves of all panels; each curve is one piece of work for the processes."""
    jobs = [
        _Job(
            Run(cell.setup, system, cell.workload, rate=0.0, duration_s=context.scale.duration_s),
            cell.start_rate * _START_SHARES[system.name],
            context.scale.num_bisections,
        )
        for cell in cells
        for system in cell.systems
    ]
    curves = iter(context.map(_sweep, jobs))
    return [Panel(cell, {system.name: next(curves) for system in cell.systems}) for cell in cells]


def ratio_rows(panel: Panel, paper: Mapping[str, Ratio]) -> list[Row]:
    """What paging sustains, and how many times each baseline's rate that is; `paper`: its ratios by system."""
    paged = panel.curves[PAGED.name].sustained_rate
    rows = [Row(f"{panel.cell.title}: {PAGED.title} sustains", "requests/s", paged)]
    for system in panel.cell.systems:
        if system.name == PAGED.name:
            continue
        rate = panel.curves[system.name].sustained_rate
        note = f"{system.title} sustains {rate:.3g} requests/s"
        ratio = paged / rate if rate else None
        rows.append(Row(f"{panel.cell.title}: paged over {system.title}", "x", ratio, paper.get(system.name), note))
    return rows


def panel_data(panels: Sequence[Panel]) -> dict[str, Any]:
    return {
        panel.cell.title: {
            name: {"sustained_rate": curve.sustained_rate, "runs": [item.as_json() for item in curve.results]}
            for name, curve in panel.curves.items()
        }
        for panel in panels
    }


def sweep_notes(context: Context, panels: Sequence[Panel]) -> list[str]:
    return [
        *dict.fromkeys(panel.cell.workload.description for panel in panels),
        f"Poisson arrivals for {context.scale.duration_s:g} simulated seconds.",
        f"A rate is sustained while the mean normalized latency is at most {SUSTAINED_BOUND_S} s a token.",
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
