"""Fig. 15: KV blocks saved by sharing them between the sequences of a request (§6.3)."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome, Row
from benchmarks.paper.runs import Run, RunResult, Workload, simulate
from benchmarks.paper.setups import OPT_13B, PAGED
from benchmarks.paper.traces import Lengths

_COUNTS = (2, 4, 6)
# Per cent; for ShareGPT the paper gives the ends of a range over the same counts.
_PAPER: dict[tuple[str, bool], tuple[float | tuple[float, float], ...]] = {
    ("Alpaca", False): (6.09, 8.53, 9.79),
    ("Alpaca", True): (37.56, 53.13, 55.16),
    ("ShareGPT", False): (16.2, (16.2, 30.5), 30.5),
    ("ShareGPT", True): (44.3, (44.3, 66.3), 66.3),
}
_RATES = {"Alpaca": 3.0, "ShareGPT": 0.5}  # requests/s


class _Bar(NamedTuple):
    trace: str
    beam: bool
    num_sequences: int
    result: RunResult

    @property
    def name(self) -> str:
        return f"{self.trace}, {'beam width' if self.beam else 'parallel size'} {self.num_sequences}"

    @property
    def saved(self) -> float:
        """Per cent of the blocks that would be held without sharing, both means over time."""
        return 100.0 * self.result.memory["blocks saved"] / self.result.memory["blocks without sharing"]

    @property
    def paper(self) -> float | tuple[float, float]:
        return _PAPER[self.trace, self.beam][_COUNTS.index(self.num_sequences)]


def run(context: Context) -> Outcome:
    traces: dict[str, Lengths] = {"Alpaca": context.alpaca, "ShareGPT": context.sharegpt}
    duration_s = min(context.scale.duration_s, 300.0)
    cells = [(trace, beam, count) for trace in traces for beam in (False, True) for count in _COUNTS]
    runs = [
        Run(
            OPT_13B,
            PAGED,
            Workload(trace, traces[trace], num_sequences=count, beam=beam),
            _RATES[trace],
            duration_s,
        )
        for trace, beam, count in cells
    ]
    bars = [_Bar(*cell, result) for cell, result in zip(cells, context.map(simulate, runs), strict=True)]
    rows = [Row(f"{bar.name}: saved", "% of blocks", bar.saved, bar.paper) for bar in bars]
    notes = [
        SIMULATED,
        *(lengths.description for lengths in traces.values()),
        f"OPT-13B, block size 16, prefix caching off, {duration_s:g} s of arrivals at {_RATES} requests/s.",
        "Blocks are counted while steps run, each beam with its own copy of the block that it writes to.",
        "Which beams survive follows made-up next-token distributions under which beams part as SmolLM2-135M's do, to",
        "within 2 points at every width and length measured: see beam_divergence.md. OPT-13B's own may part otherwise.",
    ]
    data = {bar.name: {"saved_percent": bar.saved, **bar.result.as_json()} for bar in bars}
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, bars))


def _draw(drawing: Drawing, bars: list[_Bar]) -> None:
    drawing.set_size_inches(9, 6)
    for index, (trace, beam) in enumerate(_PAPER):
        axes = drawing.add_subplot(2, 2, index + 1)
        shown = [bar for bar in bars if (bar.trace, bar.beam) == (trace, beam)]
        for position, bar in enumerate(shown):
            axes.bar_label(axes.bar(position, bar.saved, color="tab:red", width=0.6), fmt="%.1f")
            for value in bar.paper if isinstance(bar.paper, tuple) else (bar.paper,):
                axes.plot(position, value, "k_", markersize=24)
        axes.set_xticks(range(len(shown)), [str(bar.num_sequences) for bar in shown])
        axes.set(
            title=f"{trace}, {'beam search' if beam else 'parallel sampling'} (black: the paper)",
            ylabel="blocks saved (%)",
        )


FIGURE = Figure("fig15", "Memory saved by sharing", run, simulated="an A100-40GB")
