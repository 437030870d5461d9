"""What a deployment's replicas wait for before they can start, for `/health`: resources of their placement groups."""

from __future__ import annotations

import json
import logging
from typing import Any

logger = logging.getLogger("ray.serve")


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
