"""Fig. 13: requests batched together, OPT-13B at 2 requests/s of ShareGPT and 30 of Alpaca (§6.2)."""

from __future__ import annotations

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome, Row
from benchmarks.paper.runs import Run, RunResult, Workload, simulate
from benchmarks.paper.setups import OPT_13B, ORCAS, PAGED

_SYSTEMS = (*ORCAS, PAGED)
_PAPER = {
    "ShareGPT": {"orca_max": 7.00, "orca_pow2": 9.81, "orca_oracle": 13.62, "paged": 30.42},
    "Alpaca": {"orca_max": 7.00, "orca_pow2": 43.24, "orca_oracle": 72.75, "paged": 132.44},
}
_RATES = {"ShareGPT": 2.0, "Alpaca": 30.0}


def run(context: Context) -> Outcome:
    workloads = (Workload("ShareGPT", context.sharegpt), Workload("Alpaca", context.alpaca))
    duration_s = min(context.scale.duration_s, 300.0)
    runs = [Run(OPT_13B, system, item, _RATES[item.name], duration_s) for item in workloads for system in _SYSTEMS]
    bars = {
        (run.workload.name, run.system.name): result
        for run, result in zip(runs, context.map(simulate, runs), strict=True)
    }
    rows = [
        Row(
            f"{workload} at {rate:g}/s: {system.title}",
            "requests",
            bars[workload, system.name].num_batched,
            _PAPER[workload][system.name],
        )
        for workload, rate in _RATES.items()
        for system in _SYSTEMS
    ]
    data = {", ".join(names): result.as_json() for names, result in bars.items()}
    notes = [SIMULATED, *(workload.description for workload in workloads)]
    notes.append(f"Means over the last four fifths of {duration_s:g} s of arrivals.")
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, bars))


def _draw(drawing: Drawing, results: dict[tuple[str, str], RunResult]) -> None:
    drawing.set_size_inches(9, 3.5)
    for index, (workload, rate) in enumerate(_RATES.items()):
        axes = drawing.add_subplot(1, 2, index + 1)
        for position, system in enumerate(_SYSTEMS):
            bar = axes.bar(position, results[workload, system.name].num_batched, color=system.colour, width=0.6)
            axes.bar_label(bar, fmt="%.1f")
            axes.plot(position, _PAPER[workload][system.name], "k_", markersize=24)
        axes.set_xticks(range(len(_SYSTEMS)), [system.title for system in _SYSTEMS], fontsize="small")
        axes.set(title=f"{workload} at {rate:g} requests/s (black: the paper)", ylabel="requests batched")


FIGURE = Figure("fig13", "Requests batched", run, simulated="an A100-40GB")
