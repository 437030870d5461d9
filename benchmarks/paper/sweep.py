"""Latency against request rate, and the highest rate that a system sustains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.paper.runs import Run, RunResult, simulate

# The paper reads its curves at "similar latencies"; this project's bound is a mean of half a second a token.
SUSTAINED_BOUND_S = 0.5
# Beyond this a point is off the chart, and a run is cut short as soon as it must end there.
CHART_BOUND_S = 1.0


@dataclass(frozen=True)
class Curve:
    """One system's points by rate, and the rate it sustains: the highest measured one within the bound.

    `sustained_rate` is 0 if even the lowest rate tried exceeds the bound.
    """

    results: tuple[RunResult, ...]

    @property
    def sustained_rate(self) -> float:
        return max((item.rate for item in self.results if _within(item)), default=0.0)

    @property
    def at_sustained(self) -> RunResult:
        """The run at the sustained rate; the lowest rate's if none is sustained."""
        rate = self.sustained_rate or min(item.rate for item in self.results)
        return next(item for item in self.results if item.rate == rate)


def sweep(
    run: Run, start_rate: float, num_bisections: int, simulate_run: Callable[[Run], RunResult] = simulate
) -> Curve:
    """Find where the mean normalized latency crosses the bound: double or halve the rate until it does, then bisect.

    `start_rate` is only a first guess. Each bisection of the bracket, in ratio, is one more run and one more point.
    """
    results: dict[float, RunResult] = {}

    def sustains(rate: float) -> bool:
        if rate not in results:
            results[rate] = simulate_run(dataclasses.replace(run, rate=rate, bound=CHART_BOUND_S))
        return _within(results[rate])

    low = high = start_rate
    if sustains(start_rate):
        while sustains(high):
            low, high = high, high * 2
    else:
        while low > start_rate / 1024 and not sustains(low):
            low, high = low / 2, low
    for _ in range(num_bisections):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if sustains(middle) else (low, middle)
    return Curve(tuple(results[rate] for rate in sorted(results)))


def _within(result: RunResult) -> bool:
    return not result.exceeded and result.normalized_latency <= SUSTAINED_BOUND_S
