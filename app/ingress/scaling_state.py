"""How many replicas a model's deployment is to have and has, and what autoscaling has decided, for `/metrics`.

Serve's controller knows the first, Ray's control store the second. Both are asked when somebody scrapes and at most
every few seconds, on a thread; no request waits for either.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from app.autoscaling.decision_counts import DecisionCounts, read_decisions
from app.telemetry.model_samples import ScalingTelemetry

logger = logging.getLogger("ray.serve")

# Several Prometheus servers may scrape: the controller is asked this often at most.
INTERVAL_S = 5.0
_TIMEOUT_S = 3.0


class DeploymentName(NamedTuple):
    """Of a model's engine deployment."""

    application: str
    deployment: str


class ScalingState:
    """Asks for all models at once. On one event loop.

    Args:
        deployments: of the models that are served now, by the model's id.
        serve_details: Serve's account of itself, as ServeInstanceDetails has it; blocks.
        decisions: of a deployment; blocks.
    """

    def __init__(
        self,
        deployments: Callable[[], Mapping[str, DeploymentName]],
        serve_details: Callable[[], Mapping[str, Any]] | None = None,
        decisions: Callable[[str, str], DecisionCounts] = read_decisions,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deployments = deployments
        self._serve_details = serve_details or _details_of_controller
        self._decisions = decisions
        self._clock = clock
        self._asked_s = -INTERVAL_S
        self._asking: asyncio.Task[dict[str, ScalingTelemetry]] | None = None

    async def read(self) -> Mapping[str, ScalingTelemetry]:
        """By model id; a model that Serve does not know yet is missing, and all are if Serve does not answer."""
        now_s = self._clock()
        if self._asking is None or (self._asking.done() and now_s - self._asked_s >= INTERVAL_S):
            self._asked_s = now_s
            self._asking = asyncio.create_task(self._ask(), name="scaling state")
        # A controller that hangs is asked once, not once a scrape.
        done, _ = await asyncio.wait({self._asking}, timeout=_TIMEOUT_S)
        return self._asking.result() if done else {}

    async def _ask(self) -> dict[str, ScalingTelemetry]:
        try:
            return await asyncio.to_thread(self._read, dict(self._deployments()))
        except Exception as error:
            logger.warning("Serve's controller does not say how many replicas there are to be: %s", error)
            return {}

    def _read(self, deployments: Mapping[str, DeploymentName]) -> dict[str, ScalingTelemetry]:
        applications = self._serve_details()["applications"]
        found = {}
        for model_id, name in deployments.items():
            details = applications.get(name.application, {}).get("deployments", {}).get(name.deployment)
            if details is not None:
                found[model_id] = ScalingTelemetry(
                    target=details["target_num_replicas"],
                    states=count_states(details["replicas"]),
                    decisions=self._decisions(*name),
                )
        return found


def count_states(replicas: Iterable[Mapping[str, Any]]) -> Mapping[str, int]:
    """Replicas by Serve's state, in lower case; those that every deployment goes through are there at zero."""
    counted = Counter(str(getattr(replica["state"], "value", replica["state"])).lower() for replica in replicas)
    return {"starting": 0, "running": 0, "stopping": 0, **counted}


def _details_of_controller() -> Mapping[str, Any]:
    from ray.serve.context import _get_global_client

    # Private to Serve, whose version is pinned; what it gives is the dashboard's API, ServeInstanceDetails.
    client: Any = _get_global_client()
    details: Mapping[str, Any] = client.get_serve_details()
    return details
