"""Fig. 17: a chatbot, whose prompts are conversations so far, OPT-13B (§6.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.paper.curves import Cell, draw_panels, measure_panels, panel_data, ratio_rows, sweep_notes
from benchmarks.paper.figure import SIMULATED, Context, Figure, Outcome
from benchmarks.paper.runs import Workload
from benchmarks.paper.setups import OPT_13B, ORCAS, PAGED
from benchmarks.paper.traces import IntArray, Lengths

_MOST_ROUNDS = 8
_LONGEST = 1024  # of prompt and of output, as in the paper
_PAPER_RATIO = 2.0


@dataclass(frozen=True)
class ConversationLengths:
    """Prompts that hold the last 1,024 tokens of a conversation of 1 to 8 rounds, the rounds' lengths as given."""

    rounds: Lengths

    @property
    def description(self) -> str:
        return (
            f"last {_LONGEST} tokens of conversations of 1 to {_MOST_ROUNDS} rounds; rounds {self.rounds.description}"
        )

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        prompts, outputs = (item.reshape(count, _MOST_ROUNDS) for item in self.rounds.draw(count * _MOST_ROUNDS, rng))
        past = np.arange(_MOST_ROUNDS) < rng.integers(0, _MOST_ROUNDS, count)[:, None]
        history = ((prompts + outputs) * past).sum(axis=1) + prompts[:, -1]
        return np.minimum(history, _LONGEST), np.minimum(outputs[:, -1], _LONGEST)


def run(context: Context) -> Outcome:
    workload = Workload("chatbot", ConversationLengths(context.sharegpt))
    panels = measure_panels(context, [Cell(OPT_13B, workload, (*ORCAS, PAGED))])
    rows = ratio_rows(panels[0], {system.name: _PAPER_RATIO for system in ORCAS})
    notes = [
        SIMULATED,
        *sweep_notes(context, panels),
        "No KV cache is kept between rounds. In the paper the three Orca policies come out alike.",
    ]
    return Outcome(rows, panel_data(panels), notes, lambda drawing: draw_panels(drawing, panels, 1))


FIGURE = Figure("fig17", "Chatbot", run, simulated="an A100-40GB")
