"""Fig. 2: what fills the KV cache memory under each policy, OPT-13B on ShareGPT (§3.1)."""

from __future__ import annotations

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome, Row
from benchmarks.paper.observers import KINDS
from benchmarks.paper.runs import Run, RunResult, Workload, simulate
from benchmarks.paper.setups import OPT_13B, ORCAS, PAGED

_SYSTEMS = (*ORCAS, PAGED)
_PAPER = {"orca_max": 20.4, "orca_pow2": 26.8, "orca_oracle": 38.2, "paged": 96.3}
_COLOURS = ("tab:green", "tab:olive", "tab:orange", "tab:red")
_RATE = 2.0


def run(context: Context) -> Outcome:
    workload = Workload("ShareGPT", context.sharegpt)
    duration_s = min(context.scale.duration_s, 300.0)
    runs = [Run(OPT_13B, system, workload, _RATE, duration_s) for system in _SYSTEMS]
    results = dict(zip((system.name for system in _SYSTEMS), context.map(simulate, runs), strict=True))
    rows = [
        Row(
            f"{system.title}: token states",
            "% of allocated KV memory",
            _shares(results[system.name])[0],
            _PAPER[system.name],
        )
        for system in _SYSTEMS
    ]
    notes = [
        SIMULATED,
        workload.description,
        f"OPT-13B at {_RATE:g} requests/s, block size 16, prefix caching off.",
        f"Means over the last four fifths of {duration_s:g} s of arrivals.",
    ]
    data = {
        name: {"shares": dict(zip(KINDS, _shares(result), strict=True)), **result.as_json()}
        for name, result in results.items()
    }
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, results))


def _shares(result: RunResult) -> list[float]:
    """Per cent of the allocated memory, in the order of KINDS."""
    allocated = sum(result.memory[kind] for kind in KINDS)
    return [100.0 * result.memory[kind] / allocated for kind in KINDS]


def _draw(drawing: Drawing, results: dict[str, RunResult]) -> None:
    drawing.set_size_inches(7, 4)
    axes = drawing.add_subplot()
    for position, system in enumerate(_SYSTEMS):
        bottom = 0.0
        for kind, share, colour in zip(KINDS, _shares(results[system.name]), _COLOURS, strict=True):
            axes.bar(position, share, bottom=bottom, color=colour, width=0.6, label=kind if position == 0 else None)
            if share >= 3.0:
                axes.text(position, bottom + share / 2, f"{share:.1f}", ha="center", va="center")
            bottom += share
        axes.plot(position, _PAPER[system.name], "k_", markersize=28)
    axes.set_xticks(range(len(_SYSTEMS)), [system.title for system in _SYSTEMS])
    axes.set(ylabel="KV cache memory (%)", title="Black: token states in the paper")
    drawing.legend(loc="outside lower center", ncols=len(KINDS), fontsize="small")


FIGURE = Figure("fig02", "KV cache memory by kind", run, simulated="an A100-40GB")
