"""What a deployment's replicas wait for before they can start, resources of their placement groups; and why they could
not. For `/health`, and for requests that wait for a replica."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from app.autoscaling.start_failures import StartFailures, read_start_failures

logger = logging.getLogger("ray.serve")

# How often the cluster is asked, while no replica runs.
_INTERVAL_S = 2.0


class PlacementWatch:
    """Keeps at hand what a deployment's replicas wait for, while none of them runs.

    Args:
        handle: of the deployment (a DeploymentHandle).
        is_needed: whether no replica runs.
        failed: told of the starts that have failed, each time that it looks.

    Attributes:
        awaited: see awaited_resources.
    """

    def __init__(self, handle: Any, is_needed: Callable[[], bool], failed: Callable[[StartFailures], None]) -> None:
        self.awaited = ""
        self._failed = failed
        self._handle = handle
        self._is_needed = is_needed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """On the running event loop; once."""
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="placement of replicas")

    def close(self) -> None:
        """Idempotent, and no error before start()."""
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            try:
                if self._is_needed():
                    where = (self._handle.app_name, self._handle.deployment_name)
                    self.awaited = await asyncio.to_thread(awaited_resources, *where)
                    self._failed(await asyncio.to_thread(read_start_failures, *where))
            except Exception:
                logger.exception("what replicas wait for cannot be told")
            await asyncio.sleep(_INTERVAL_S)


def awaited_resources(app: str, deployment: str) -> str:
    """One line, empty if no replica waits for resources. Asks Ray's control store, so not on an event loop."""
    from ray.util.placement_group import placement_group_table

    try:
        table: dict[str, dict[str, Any]] = placement_group_table()
    except Exception as error:
        # It is only what /health says beside "starting".
        logger.debug("no table of placement groups: %s", error)
        return ""
    return describe_waiting(list(table.values()), app, deployment)


def describe_waiting(groups: list[dict[str, Any]], app: str, deployment: str) -> str:
    """Of Ray's table, the groups of this deployment that are not placed yet."""
    # Serve names a placement group after its replica.
    prefix = f"SERVE_REPLICA::{app}#{deployment}#"
    waiting = [group for group in groups if group["name"].startswith(prefix) and group["state"] == "PENDING"]
    if not waiting:
        return ""
    bundles = list(waiting[0]["bundles"].values())
    where = " on one node" if waiting[0]["strategy"] == "STRICT_PACK" else ""
    state = waiting[0]["stats"]["scheduling_state"]
    why = "no node has as much" if state == "INFEASIBLE" else "not free yet"
    return f"waiting for resources: {len(bundles)} x {json.dumps(bundles[0])}{where} ({why})"
