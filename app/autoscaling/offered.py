"""Offered load: what replicas' exports say of how much is asked of a model, over time. No Ray, no clock of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from app.autoscaling.report import ReplicaReport

# How far back a trend is looked for.
TREND_S = 16.0
_BIN_S = 1.0
_MIN_BINS = 6


class Rates(NamedTuple):
    """Averages over a time, each a second.

    Attributes:
        requests, prompt_tokens, output_tokens: offered; prompt tokens to be computed.
        prompt_squares: squares of the former, request by request.
        drawn_tokens: output tokens that replicas have drawn.
    """

    requests: float
    prompt_tokens: float
    prompt_squares: float
    output_tokens: float
    drawn_tokens: float

    @property
    def mean_prompt(self) -> float:
        """Tokens of a request's prompt; 0 if there is none."""
        return self.prompt_tokens / self.requests if self.requests else 0.0

    @property
    def prompt_variation(self) -> float:
        """Variance of a prompt's tokens over the square of their mean."""
        if not self.prompt_tokens:
            return 0.0
        return max(self.prompt_squares * self.requests / self.prompt_tokens**2 - 1.0, 0.0)


class _Growth(NamedTuple):
    at_s: float
    rates: tuple[float, ...]


class OfferedLoad:
    """Adds up by how much the counters of each replica have grown.

    A replica's first export is where its counters begin: it may be that of a controller that has started again. What
    has left takes its counters along, at most what came since its last export.
    """

    def __init__(self) -> None:
        self._counters: dict[str, tuple[float, ...]] = {}
        self._growth: deque[_Growth] = deque()
        self._since_s = math.inf

    def observe(self, now_s: float, reports: Mapping[str, ReplicaReport]) -> None:
        """Take the latest exports in; the same ones again add nothing."""
        self._since_s = min(self._since_s, now_s)
        grown = [0.0] * len(Rates._fields)
        counters: dict[str, tuple[float, ...]] = {}
        for replica_id, report in reports.items():
            now = (
                report.offered_requests,
                report.offered_prompt_tokens,
                report.offered_prompt_squares,
                report.offered_output_tokens,
                report.num_output_tokens,
            )
            counters[replica_id] = now
            before = self._counters.get(replica_id, now)
            for index in range(len(grown)):
                grown[index] += max(now[index] - before[index], 0.0)
        self._counters = counters
        if any(grown):
            self._growth.append(_Growth(now_s, tuple(grown)))
        while self._growth and self._growth[0].at_s <= now_s - TREND_S:
            self._growth.popleft()

    def rates(self, now_s: float, window_s: float) -> Rates:
        """Averages over the last `window_s`, TREND_S at most, or since the first export if that is shorter."""
        elapsed_s = max(min(window_s, now_s - self._since_s), _BIN_S)
        begin_s = now_s - elapsed_s
        recent = [growth for growth in self._growth if growth.at_s > begin_s]
        return Rates(
            *(sum(growth.rates[index] for growth in recent) / elapsed_s for index in range(len(Rates._fields)))
        )

    def trend(self, now_s: float) -> float:
        """By how much prompt tokens a second grow each second; 0 while noise could look the same.

        The slope of a least-squares line through the last seconds' sums, less its standard error.
        """
        num_bins = int(min(now_s - self._since_s, TREND_S) / _BIN_S)
        if num_bins < _MIN_BINS:
            return 0.0
        bins = [0.0] * num_bins
        for growth in self._growth:
            index = int((now_s - growth.at_s) / _BIN_S)
            if 0 <= index < num_bins:
                bins[num_bins - 1 - index] += growth.rates[1] / _BIN_S
        middle, mean = (num_bins - 1) / 2, sum(bins) / num_bins
        spread = sum((index - middle) ** 2 for index in range(num_bins))
        slope = sum((index - middle) * (rate - mean) for index, rate in enumerate(bins)) / spread
        error = sum((rate - mean - slope * (index - middle)) ** 2 for index, rate in enumerate(bins))
        doubt = math.sqrt(error / (num_bins - 2) / spread)
        return math.copysign(max(abs(slope) - doubt, 0.0), slope) / _BIN_S
