"""The policy that Serve's controller calls, ten times a second: Serve's context in, a number of replicas out.

Serve pickles this module by value, so that nothing here may keep state but the policy itself. Delays and bounds are
app.autoscaling.sizing's; those that Serve would add are set to zero where the deployment is built.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.config import AutoscalingContext
from ray.util.metrics import Counter

from app.autoscaling.decision_counts import DecisionCounter
from app.autoscaling.report import Observation, ReplicaReport
from app.autoscaling.sizing import Sizer, SizingRules

# Serve's controller writes what is logged here to its own log.
logger = logging.getLogger("ray.serve")


class ReplicaSizingPolicy:
    """An autoscaling policy of Serve's over a Sizer. One a deployment.

    Args:
        rules: fields of SizingRules.
    """

    def __init__(self, **rules: Any) -> None:
        self._sizer = Sizer(SizingRules(**rules))
        self._logged: int | None = None
        self._counter = DecisionCounter()
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
        decision = self._sizer.decide(observation(context))
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


def observation(context: AutoscalingContext) -> Observation:
    """What Serve has collected, as sizing takes it."""
    by_replica: dict[str, dict[str, float]] = {}
    for name, series_of in (context.raw_metrics or {}).items():
        for replica_id, series in series_of.items():
            if series:
                by_replica.setdefault(replica_id.unique_id, {})[name] = series[-1].value
    return Observation(
        now_s=context.current_time or 0.0,
        target=context.target_num_replicas,
        num_running=context.current_num_replicas,
        reports={replica_id: ReplicaReport.of(numbers) for replica_id, numbers in by_replica.items()},
        open_requests=context.total_num_requests,
    )
