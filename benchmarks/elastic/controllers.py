"""What is compared: this project's sizing, Ray's default policy by Ray's own code, and fleets that know their size."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from app.autoscaling.report import Observation
from app.autoscaling.sizing import Sizer, SizingRules


class SizerController:
    """app.autoscaling's own code."""

    def __init__(self, rules: SizingRules) -> None:
        self._sizer = Sizer(rules)

    def decide(self, seen: Observation) -> int:
        return self._sizer.decide(seen).num_replicas


class RayOptions(NamedTuple):
    """Of Serve's AutoscalingConfig, what the sweep sets: its default policy's only knob, and how soon it knows."""

    target_ongoing_requests: float
    metrics_interval_s: float = 10.0
    look_back_period_s: float = 30.0


class RayController:
    """Serve's default policy: open requests, averaged over the look-back, over the target of each replica."""

    def __init__(self, options: RayOptions, rules: SizingRules) -> None:
        self._options = options
        self._rules = rules
        self._config = AutoscalingConfig(
            min_replicas=rules.min_replicas,
            max_replicas=rules.max_replicas,
            target_ongoing_requests=options.target_ongoing_requests,
            upscale_delay_s=0.0,
            downscale_delay_s=rules.downscale_delay_s,
            downscale_to_zero_delay_s=rules.idle_to_zero_s,
        )
        self._state: dict[str, Any] = {}
        self._samples: deque[tuple[float, float]] = deque()
        self._pushed: list[tuple[float, float]] = []
        self._pushed_at_s = 0.0

    def decide(self, seen: Observation) -> int:
        options = self._options
        self._samples.append((seen.now_s, seen.open_requests))
        while self._samples[0][0] < seen.now_s - options.look_back_period_s:
            self._samples.popleft()
        if seen.now_s - self._pushed_at_s >= options.metrics_interval_s:
            self._pushed_at_s, self._pushed = seen.now_s, list(self._samples)
        if not seen.num_running:
            return seen.target
        requests = sum(value for _, value in self._pushed) / len(self._pushed) if self._pushed else 0.0
        desired = -(-requests // options.target_ongoing_requests)
        number, self._state = _apply_delay_logic(int(desired), seen.target, self._config, self._state, seen.now_s)
        return max(self._rules.min_replicas, min(number, self._rules.max_replicas))


class FixedController:
    """Always so many."""

    def __init__(self, num_replicas: int) -> None:
        self._num_replicas = num_replicas

    def decide(self, seen: Observation) -> int:  # noqa: ARG002 - whatever is seen
        return self._num_replicas


class ScheduleController:
    """A number for each `period_s`, known beforehand."""

    def __init__(self, numbers: Sequence[int], period_s: float) -> None:
        self._numbers = numbers
        self._period_s = period_s

    def decide(self, seen: Observation) -> int:
        index = int(seen.now_s / self._period_s + 1e-9)
        return self._numbers[min(index, len(self._numbers) - 1)]
