"""Fig. 14: parallel sampling and beam search, OPT-13B on Alpaca (§6.3)."""

from __future__ import annotations

from benchmarks.paper.curves import Cell, Ratio, draw_panels, measure_panels, panel_data, ratio_rows, sweep_notes
from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome
from benchmarks.paper.runs import Workload
from benchmarks.paper.setups import OPT_13B, ORCA_ORACLE, PAGED

# Sequences of a request, and whether they are beams.
_CASES = ((1, False), (2, False), (4, False), (6, False), (2, True), (4, True), (6, True))
_QUICK_CASES = (_CASES[1], _CASES[4])
_DURATION_SHARE = 0.2
# §6.3: over Orca (Oracle), from basic sampling to a beam width of 6.
_PAPER: dict[str, Ratio] = {"basic": 1.3, "beam width 6": 2.3}


def run(context: Context) -> Outcome:
    cells = [
        Cell(
            OPT_13B,
            Workload(_name(count, beam), context.alpaca, num_sequences=count, beam=beam),
            (ORCA_ORACLE, PAGED),
            _DURATION_SHARE,
        )
        for count, beam in (_QUICK_CASES if context.scale.quick else _CASES)
    ]
    panels = measure_panels(context, cells)
    rows = [
        row for panel in panels for row in ratio_rows(panel, {ORCA_ORACLE.name: _PAPER.get(panel.cell.workload.name)})
    ]
    notes = [
        SIMULATED,
        *sweep_notes(context, panels),
        "Latency is normalized by the length of one sequence of a request. Which beams survive is made up: see fig15.",
    ]
    return Outcome(rows, panel_data(panels), notes, lambda drawing: draw_panels(drawing, panels, min(4, len(panels))))


def _name(num_sequences: int, beam: bool) -> str:
    if num_sequences == 1:
        return "basic"
    return f"beam width {num_sequences}" if beam else f"parallel size {num_sequences}"


FIGURE = Figure("fig14", "Parallel sampling and beam search, Alpaca", run, simulated="an A100-40GB")
