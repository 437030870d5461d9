"""Fig. 12: normalized latency against request rate, basic sampling, three models on two traces (§6.2)."""

from __future__ import annotations

from benchmarks.paper.curves import Cell, Ratio, draw_panels, measure_panels, panel_data, ratio_rows, sweep_notes
from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome
from benchmarks.paper.runs import Workload
from benchmarks.paper.setups import OPT_13B, OPT_66B, OPT_175B, SYSTEMS

# Alpaca's outputs are a sixth as long as ShareGPT's: a fifth of the time lets as many generations pass.
_DURATION_SHARES = {"ShareGPT": 1.0, "Alpaca": 0.2}
# §6.2 gives ranges over the three models for ShareGPT, and words for Alpaca.
_PAPER: dict[str, Ratio] = {"orca_oracle": (1.7, 2.7), "orca_max": (2.7, 8.0), "static": (1.0, 22.0)}


def run(context: Context) -> Outcome:
    setups = (OPT_13B,) if context.scale.quick else (OPT_13B, OPT_66B, OPT_175B)
    workloads = (Workload("ShareGPT", context.sharegpt), Workload("Alpaca", context.alpaca))
    cells = [
        Cell(setup, workload, SYSTEMS, _DURATION_SHARES[workload.name]) for workload in workloads for setup in setups
    ]
    panels = measure_panels(context, cells)
    rows = [
        row for panel in panels for row in ratio_rows(panel, _PAPER if panel.cell.workload.name == "ShareGPT" else {})
    ]
    notes = [
        SIMULATED,
        *sweep_notes(context, panels),
        "The paper's ratios are over all three models; its static batching is FasterTransformer with its own kernels.",
        "What the ratios rest on: see `sensitivity`.",
        "On Alpaca it gives no ratios but says that OPT-175B gains little, being bound by arithmetic.",
    ]
    return Outcome(rows, panel_data(panels), notes, lambda drawing: draw_panels(drawing, panels, len(setups)))


FIGURE = Figure("fig12", "Normalized latency against request rate", run, simulated="A100s as the paper ran them")
