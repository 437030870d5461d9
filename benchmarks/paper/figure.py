"""What every figure gives: rows that compare with the paper, raw data, and a drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure as Drawing

from benchmarks.paper.traces import ALPACA, SHAREGPT, Lengths, load_lengths

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One number beside the paper's.

    Attributes:
        paper: the paper's value, or the (lowest, highest) of a range it gives, or None where it gives none.
    """

    what: str
    unit: str
    ours: float | None
    paper: float | tuple[float, float] | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours over the paper's value; over the nearer end of a range that ours lies outside of, 1 inside it."""
        if self.ours is None or self.paper is None:
            return None
        low, high = self.paper if isinstance(self.paper, tuple) else (self.paper, self.paper)
        return self.ours / min(max(self.ours, low), high)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "paper": list(self.paper) if isinstance(self.paper, tuple) else self.paper,
            "ratio": self.ratio,
            "note": self.note,
        }


@dataclass(frozen=True)
class Outcome:
    """A finished figure. `data` is what the drawing shows, as plain JSON; `notes` say how it came about."""

    rows: Sequence[Row]
    data: dict[str, Any]
    notes: Sequence[str]
    draw: Callable[[Drawing], None]


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        quick: seconds rather than minutes: shorter traces, fewer points, fewer models.
        duration_s: length of a simulated ShareGPT-shaped trace (the paper's are an hour; 15 minutes for OPT-175B).
            Alpaca's requests, a sixth as long, arrive for a share of it.
        rate_shares: where each curve is measured first, as shares of the rate that the system serves when saturated.
        real_s: seconds to spend on each measurement of real kernels.
    """

    quick: bool
    duration_s: float
    rate_shares: tuple[float, ...]
    real_s: float


FULL = Scale(quick=False, duration_s=300.0, rate_shares=(0.6, 1.0, 1.25), real_s=0.5)
QUICK = Scale(quick=True, duration_s=60.0, rate_shares=(0.8, 1.3), real_s=0.05)


@dataclass(frozen=True)
class Context:
    """What a figure may use."""

    scale: Scale
    pool: Executor
    sharegpt: Lengths = SHAREGPT
    alpaca: Lengths = ALPACA

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`function` of each item, spread over the processes; function and items are picklable."""
        return list(self.pool.map(function, items))


@dataclass(frozen=True)
class Figure:
    """One of the paper's figures.

    Attributes:
        name: as the command line spells it.
        simulated: on what, in words; empty for figures of real kernels and copies.
    """

    name: str
    title: str
    run: Callable[[Context], Outcome]
    simulated: str = ""


SIMULATED = (
    "Simulated device: step times from a roofline model of the named hardware; scheduler, allocator and block tables "
    "are the real ones. The baselines are this engine with the paper's reservation policies, on the same step times."
)


def make_context(scale: Scale, pool: Executor, trace: Path | None) -> Context:
    """A real trace's lengths, where given, take the place of the ShareGPT-shaped ones."""
    return Context(scale, pool) if trace is None else Context(scale, pool, sharegpt=load_lengths(trace))
