"""A rate that every replica measures on itself, with an error: how far replicas that seem to differ are believed to."""

from __future__ import annotations

import math


class RatePool:
    """What replicas have measured of one rate, each drawn towards the others by as much as it is uncertain.

    Empirical Bayes: of the replicas' variance around their mean, what their errors do not explain is taken to be real
    difference. A replica whose squared error is `e` keeps the share `v / (v + e)` of its distance from the mean, `v`
    being that real variance; equal replicas, which only noise tells apart, come out equal. The mean and `v` are
    DerSimonian and Laird's (Controlled Clinical Trials 7, 1986), taken anew once as many have told as there are, so
    that a report costs the same however many replicas there are.

    Args:
        default: the rate while nobody has measured it.
    """

    def __init__(self, default: float) -> None:
        self._mean = default
        self._variance = 0.0
        self._measured: dict[int, tuple[float, float]] = {}
        self._untaken = 0

    def tell(self, slot: int, rate: float, error: float) -> None:
        """What a replica has measured, and the standard error of it; a rate of 0 is not measured yet."""
        if rate > 0:
            self._measured[slot] = rate, error * error
        self._untaken += 1
        if self._untaken >= len(self._measured):
            self._take()

    def forget(self, slot: int) -> None:
        """A replica has gone."""
        self._measured.pop(slot, None)

    def estimate(self, slot: int) -> float:
        """What a replica's rate is taken to be: the mean if it has measured none."""
        measured = self._measured.get(slot)
        if measured is None:
            return self._mean
        rate, squared_error = measured
        if not squared_error:
            return rate
        return self._mean + (rate - self._mean) * self._variance / (self._variance + squared_error)

    def _take(self) -> None:
        self._untaken = 0
        count = len(self._measured)
        if not count:
            return
        # An exact one among the others must not outweigh them all.
        least = 1e-6 * math.fsum(rate for rate, _ in self._measured.values()) / count
        weighed = [(1.0 / max(squared, least * least), rate) for rate, squared in self._measured.values()]
        self._variance = _excess_variance(weighed)
        self._mean = _mean([(1.0 / (1.0 / weight + self._variance), rate) for weight, rate in weighed])


def _mean(weighed: list[tuple[float, float]]) -> float:
    return math.fsum(weight * rate for weight, rate in weighed) / math.fsum(weight for weight, _ in weighed)


def _excess_variance(weighed: list[tuple[float, float]]) -> float:
    """Variance beyond what the weights, which are inverse squared errors, explain; 0 of a single one."""
    total = math.fsum(weight for weight, _ in weighed)
    mean = _mean(weighed)
    scatter = math.fsum(weight * (rate - mean) ** 2 for weight, rate in weighed)
    freedom = total - math.fsum(weight * weight for weight, _ in weighed) / total
    return max(scatter - (len(weighed) - 1), 0.0) / freedom if freedom > 0 else 0.0
