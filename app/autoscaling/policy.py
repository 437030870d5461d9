"""The policy that Serve's controller calls, ten times a second: Serve's context in, a number of replicas out.

Serve pickles this module by value, so that nothing here may keep state but the policy itself. Delays and bounds are
app.autoscaling.sizing's; those that Serve would add are set to zero where the deployment is built.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.util.metrics import Counter

from app.autoscaling.decision_counts import DecisionCounter
from app.autoscaling.report import Observation, ReplicaReport
from app.autoscaling.sizing import Sizer, SizingRules
from app.autoscaling.start_failures import read_start_failures

# Serve's controller writes what is logged here to its own log.
logger = logging.getLogger("ray.serve")

# How often failed starts are asked for, while no replica runs.
_FAILURES_INTERVAL_S = 1.0


class ReplicaSizingPolicy:
    """An autoscaling policy of Serve's over a Sizer. One a deployment.

    Args:
        clock: seconds that only go forward. Serve's context has the time of day, which is set back and forth.
        rules: fields of SizingRules.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, **rules: Any) -> None:
        self._clock = clock
        self._sizer = Sizer(SizingRules(**rules))
        self._logged: int | None = None
        self._counter = DecisionCounter()
        self._failed_starts = 0
        self._asked_s = -math.inf
        self._decisions = Counter(
            "quire_scaling_decisions",
            description="Decisions to have more or fewer replicas of a model, by direction and cause",
            tag_keys=("application", "deployment", "direction", "cause"),
        )

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve's hook: the number of replicas, and state that Serve keeps for policies that are functions."""
        target = context.target_num_replicas
        name = (context.app_name or "", context.deployment_name)
        self._counter.begin(*name)
        now_s = self._clock()
        decision = self._sizer.decide(observation(context, now_s, self._starts_that_failed(context, now_s)))
        if decision.num_replicas != target and decision.num_replicas != self._logged:
            direction = "up" if decision.num_replicas > target else "down"
            logger.info(
                "Scaling %s of %s %s, %d -> %d replicas, for %s: %s",
                context.deployment_name,
                context.app_name,
                direction,
                target,
                decision.num_replicas,
                decision.cause,
                decision.reason,
            )
            self._counter.count(*name, direction, decision.cause)
            self._decisions.inc(
                tags={
                    "application": context.app_name or "",
                    "deployment": context.deployment_name,
                    "direction": direction,
                    "cause": decision.cause,
                }
            )
        # Serve goes to zero from one only, and asks again until it is there.
        self._logged = None if decision.num_replicas == target else decision.num_replicas
        return decision.num_replicas, {}

    def _starts_that_failed(self, context: AutoscalingContext, now_s: float) -> int:
        """Ever; looked up while no replica runs."""
        if not context.current_num_replicas and now_s - self._asked_s >= _FAILURES_INTERVAL_S:
            self._asked_s = now_s
            self._failed_starts = read_start_failures(context.app_name or "", context.deployment_name).number
        return self._failed_starts


def observation(context: AutoscalingContext, now_s: float, failed_starts: int = 0) -> Observation:
    """What Serve has collected, as sizing takes it."""
    by_replica: dict[str, dict[str, float]] = {}
    for name, series_of in (context.raw_metrics or {}).items():
        for replica_id, series in series_of.items():
            if series:
                by_replica.setdefault(replica_id.unique_id, {})[name] = series[-1].value
    return Observation(
        now_s=now_s,
        target=context.target_num_replicas,
        num_running=context.current_num_replicas,
        reports={replica_id: ReplicaReport.of(numbers) for replica_id, numbers in by_replica.items()},
        open_requests=context.total_num_requests,
        failed_starts=failed_starts,
    )
