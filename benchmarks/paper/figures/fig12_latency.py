"""Fig. 12: normalized latency against request rate, basic sampling, three models on two traces (§6.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome, Row
from benchmarks.paper.runs import Run, Workload
from benchmarks.paper.setups import OPT_13B, OPT_66B, OPT_175B, ORCA_MAX, ORCA_ORACLE, PAGED, STATIC, SYSTEMS, Setup
from benchmarks.paper.sweep import CHART_BOUND_S, SUSTAINED_BOUND_S, Curve, sweep

# Where the search for each sustained rate starts: requests a second that paging sustains, and what share of it others.
_START_RATES = {
    ("OPT-13B", "ShareGPT"): 2.0,
    ("OPT-66B", "ShareGPT"): 1.0,
    ("OPT-175B", "ShareGPT"): 2.0,
    ("OPT-13B", "Alpaca"): 24.0,
    ("OPT-66B", "Alpaca"): 16.0,
    ("OPT-175B", "Alpaca"): 16.0,
}
_START_SHARES = {"paged": 1.0, "orca_oracle": 0.5, "orca_pow2": 0.35, "orca_max": 0.2, "static": 0.1}

# §6.2, for ShareGPT. OPT-175B on Alpaca gains little: it is bound by arithmetic, the paper says without a number.
_PAPER_RATIOS = {ORCA_ORACLE.name: (1.7, 2.7), ORCA_MAX.name: (2.7, 8.0), STATIC.name: (1.0, 22.0)}


class Panel(NamedTuple):
    """One of the figure's six panels."""

    setup: Setup
    workload: Workload
    curves: dict[str, Curve]

    @property
    def title(self) -> str:
        return f"{self.setup.title}, {self.workload.name}"


class _Job(NamedTuple):
    run: Run
    start_rate: float
    num_bisections: int


def _sweep(job: _Job) -> Curve:
    return sweep(job.run, job.start_rate, job.num_bisections)


def measure(context: Context) -> list[Panel]:
    setups = (OPT_13B,) if context.scale.quick else (OPT_13B, OPT_66B, OPT_175B)
    workloads = (Workload("ShareGPT", context.sharegpt), Workload("Alpaca", context.alpaca))
    cells = [(setup, workload) for workload in workloads for setup in setups]
    jobs = [
        _Job(
            Run(setup, system, workload, rate=0.0, duration_s=context.scale.duration_s),
            _START_RATES[setup.title, workload.name] * _START_SHARES[system.name],
            context.scale.num_bisections,
        )
        for setup, workload in cells
        for system in SYSTEMS
    ]
    curves = iter(context.map(_sweep, jobs))
    return [Panel(setup, workload, {system.name: next(curves) for system in SYSTEMS}) for setup, workload in cells]


def run(context: Context) -> Outcome:
    panels = measure(context)
    rows = [row for panel in panels for row in _rows(panel)]
    notes = [
        SIMULATED,
        *dict.fromkeys(panel.workload.description for panel in panels),
        f"Poisson arrivals for {context.scale.duration_s:g} simulated seconds.",
        f"A rate is sustained while the mean normalized latency is at most {SUSTAINED_BOUND_S} s a token.",
        "The paper gives ratios, no rates.",
    ]
    return Outcome(rows, {panel.title: _data(panel) for panel in panels}, notes, lambda drawing: _draw(drawing, panels))


def _rows(panel: Panel) -> list[Row]:
    paged = panel.curves[PAGED.name].sustained_rate
    rows = [Row(f"{panel.title}: {PAGED.title} sustains", "requests/s", paged)]
    for system in SYSTEMS:
        if system is PAGED:
            continue
        rate = panel.curves[system.name].sustained_rate
        paper = _PAPER_RATIOS.get(system.name) if panel.workload.name == "ShareGPT" else None
        note = f"{system.title} sustains {rate:.3g} requests/s"
        rows.append(Row(f"{panel.title}: paged over {system.title}", "x", paged / rate if rate else None, paper, note))
    return rows


def _data(panel: Panel) -> dict[str, Any]:
    return {
        name: {"sustained_rate": curve.sustained_rate, "runs": [item.as_json() for item in curve.results]}
        for name, curve in panel.curves.items()
    }


def _draw(drawing: Drawing, panels: list[Panel]) -> None:
    columns = (len(panels) + 1) // 2
    drawing.set_size_inches(4.5 * columns, 6.5)
    for index, panel in enumerate(panels):
        axes = drawing.add_subplot(2, columns, index + 1)
        for system in SYSTEMS:
            points = [item for item in panel.curves[system.name].results if not item.exceeded]
            axes.plot(
                [item.rate for item in points],
                [item.normalized_latency for item in points],
                marker=".",
                label=system.title,
                color=system.colour,
            )
        axes.axhline(SUSTAINED_BOUND_S, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=panel.title, xlabel="requests/s", ylabel="normalized latency (s/token)", ylim=(0, CHART_BOUND_S))
        axes.set_xlim(left=0)
    drawing.axes[0].legend(fontsize="small")


FIGURE = Figure("fig12", "Normalized latency against request rate", run, simulated="A100s as the paper ran them")
