"""Latency against request rate, and the highest rate that a system sustains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.paper.runs import Run, RunResult, simulate

# The paper reads its curves at "similar latencies"; this project's bound is a mean of half a second a token.
SUSTAINED_BOUND_S = 0.5
# Beyond this a point is off the chart, and a run is cut short as soon as it must end there.
CHART_BOUND_S = 1.0
# How close, in ratio, a rate within the bound and one whose run was cut short are brought to each other.
_CLOSE = 1.1


@dataclass(frozen=True)
class Curve:
    """One system's points by rate, lowest first, and what it serves when requests always wait, requests/s."""

    results: tuple[RunResult, ...]
    saturated_rate: float

    @property
    def sustained_rate(self) -> float:
        """Where the mean normalized latency crosses the bound, on a line between the points on its two sides.

        The highest rate within the bound if the point beyond it was cut short, or if there is none; 0 if even the
        lowest rate exceeds it.
        """
        if not _within(self.results[0]):
            return 0.0
        for low, high in pairwise(self.results):
            if high.exceeded:
                return low.rate
            if not _within(high):
                rise = high.normalized_latency - low.normalized_latency
                return low.rate + (SUSTAINED_BOUND_S - low.normalized_latency) / rise * (high.rate - low.rate)
        return self.results[-1].rate


def sweep(
    run: Run, saturated_rate: float, shares: Sequence[float], simulate_run: Callable[[Run], RunResult] = simulate
) -> Curve:
    """Measure at these shares of the saturated rate, lowest first, until the mean normalized latency exceeds the bound.

    A trace that ends can be sustained beyond saturation, for its last requests need not wait: the last share is
    raised by as much again until the bound is crossed. A point that was cut short says little of where that was; then
    the gap to the one below is halved, in ratio, until it is small or an uncut point is found.
    """
    results: list[RunResult] = []
    step = shares[-1] / shares[-2] if len(shares) > 1 else 1.3
    pending = [*shares]
    while not results or _within(results[-1]):
        share = pending.pop(0) if pending else results[-1].rate / saturated_rate * step
        results.append(_at(run, share * saturated_rate, simulate_run))
    while len(results) > 1 and results[-1].exceeded and results[-1].rate > _CLOSE * results[-2].rate:
        middle = _at(run, (results[-2].rate * results[-1].rate) ** 0.5, simulate_run)
        if _within(middle):
            results.insert(-1, middle)
        else:
            results[-1] = middle
    return Curve(tuple(results), saturated_rate)


def _at(run: Run, rate: float, simulate_run: Callable[[Run], RunResult]) -> RunResult:
    return simulate_run(dataclasses.replace(run, rate=rate, bound=CHART_BOUND_S))


def _within(result: RunResult) -> bool:
    return not result.exceeded and result.normalized_latency <= SUSTAINED_BOUND_S
