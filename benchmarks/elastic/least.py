"""The least replica-seconds: of a schedule made with knowledge of every arrival, found by local search.

Such a schedule has a number of replicas for each `period_s`, asked for so long before that each is ready when it is
meant to be; a start costs its seconds, as it costs everyone. It is the least that the search finds, replica by replica
and period by period, while 95 of 100 first tokens keep their target in the same simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.elastic.controllers import ScheduleController
from benchmarks.elastic.report import late_ttft_s
from benchmarks.elastic.simulation import ElasticSimulation, Timing
from benchmarks.elastic.workload import ElasticRequest, Prices


class Least(NamedTuple):
    """A schedule: replicas in each period, and the seconds of them all, starts included."""

    replica_s: float
    numbers: list[int]
    period_s: float


def least_replica_s(
    requests: Sequence[ElasticRequest],
    prices: Prices,
    max_replicas: int,
    ttft_target_s: float,
    start_s: float,
    period_s: float = 2.0,
) -> Least:
    """Search for it; half a minute for a thousand requests."""
    end_s = max(request.due_s for request in requests)
    numbers = [max_replicas] * (int(end_s / period_s) + 2)

    def cost_of(trial: list[int]) -> float | None:
        simulation = ElasticSimulation(prices, ScheduleController(trial, period_s), Timing(0.0), trial[0])
        outcome = simulation.run(requests, end_s)
        if late_ttft_s(outcome.ttft_s) > ttft_target_s:
            return None
        return outcome.replica_s + start_s * len(outcome.lives)

    best = cost_of(numbers)
    if best is None:
        raise ValueError(f"{max_replicas} replicas cannot keep a first token's target of {ttft_target_s:g} s")
    improved = True
    while improved:
        improved = False
        # One replica less for one period, or for some in a row, which saves a start.
        for span in (1, 2, 4, 8):
            for begin in range(len(numbers) - span + 1):
                trial = numbers[:]
                for index in range(begin, begin + span):
                    trial[index] = max(trial[index] - 1, 0)
                cost = cost_of(trial) if trial != numbers else None
                if cost is not None and cost < best - 1e-9:
                    numbers, best, improved = trial, cost, True
    return Least(best, numbers, period_s)
