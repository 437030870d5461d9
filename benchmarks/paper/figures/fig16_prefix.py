"""Fig. 16: a prefix that all prompts share, LLaMA-13B translating (§6.4)."""

from __future__ import annotations

from benchmarks.paper.curves import Cell, draw_panels, measure_panels, panel_data, ratio_rows, sweep_notes
from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome
from benchmarks.paper.replay import shared_prefix
from benchmarks.paper.runs import Workload
from benchmarks.paper.setups import LLAMA_13B, ORCA_ORACLE, PAGED, System
from benchmarks.paper.traces import DrawnLengths, LogNormal

# WMT16 English to German: the paper gives the prefixes' lengths, not the sentences'.
_SENTENCES = DrawnLengths("WMT16-En-De", LogNormal(29.0, 0.55, 256), LogNormal(36.0, 0.55, 256))
# Prefix tokens and examples in them, and the paper's gain over Orca (Oracle).
_CASES = ((80, 1, 1.67), (341, 5, 3.58))
_DURATION_SHARE = 0.5


def run(context: Context) -> Outcome:
    cells = [
        Cell(
            LLAMA_13B,
            Workload(f"{shots}-shot prefix of {length} tokens", _SENTENCES, num_shared=length),
            (ORCA_ORACLE, _with_prefix(length)),
            _DURATION_SHARE,
        )
        for length, shots, _ in _CASES
    ]
    panels = measure_panels(context, cells)
    rows = [
        row
        for panel, (_, _, gain) in zip(panels, _CASES, strict=True)
        for row in ratio_rows(panel, {ORCA_ORACLE.name: gain})
    ]
    notes = [
        SIMULATED,
        *sweep_notes(context, panels),
        "Paging computes the prefix's full blocks once, pins them and finds them by hash; Orca repeats all each time.",
        "The paper does not give the sentences' lengths: they are assumed.",
    ]
    return Outcome(rows, panel_data(panels), notes, lambda drawing: draw_panels(drawing, panels, len(panels)))


def _with_prefix(length: int) -> System:
    """Paging with the prefix configured, as a provider would."""
    vocab_size = LLAMA_13B.model_config().vocab_size
    options = {"enable_prefix_caching": True, "shared_prefixes": {"examples": shared_prefix(vocab_size, 0, length)}}
    return System(PAGED.name, PAGED.title, PAGED.colour, {**PAGED.options, **options})


FIGURE = Figure("fig16", "Shared prefix, LLaMA-13B", run, simulated="an A100-40GB")
