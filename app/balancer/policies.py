"""Policies by the name that a configuration or a benchmark gives them."""

from __future__ import annotations

from collections.abc import Callable

from app.balancer.baselines import (
    DynamoLinearPolicy,
    LeastTokensPolicy,
    LMetricPolicy,
    PendingPlusMissPolicy,
    PowerOfTwoPolicy,
    PrefixThresholdPolicy,
    RoundRobinPolicy,
)
from app.balancer.policy import CheapestPolicy, Policy

DEFAULT_POLICY = "cheapest"

POLICIES: dict[str, Callable[[], Policy]] = {
    "cheapest": CheapestPolicy,
    "pending_plus_miss": PendingPlusMissPolicy,
    "lmetric": LMetricPolicy,
    "dynamo_linear": DynamoLinearPolicy,
    "prefix_threshold": PrefixThresholdPolicy,
    "least_tokens": LeastTokensPolicy,
    "power_of_two": PowerOfTwoPolicy,
    "round_robin": RoundRobinPolicy,
}


def make_policy(name: str) -> Policy:
    """A policy of its own, with its own state. Raises ValueError for a name that is none."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r} is unknown; there are {', '.join(POLICIES)}")
    return POLICIES[name]()
