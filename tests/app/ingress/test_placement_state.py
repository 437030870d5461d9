"""What replicas wait for, in one line."""

from __future__ import annotations

from typing import Any

import pytest

from app.ingress.placement_state import describe_waiting


def group(
    name: str, state: str = "PENDING", scheduling: str = "QUEUED", strategy: str = "STRICT_PACK"
) -> dict[str, Any]:
    bundles = {0: {"GPU": 1.0}, 1: {"GPU": 1.0}}
    return {
        "name": name,
        "state": state,
        "strategy": strategy,
        "bundles": bundles,
        "stats": {"scheduling_state": scheduling},
    }


OURS = "SERVE_REPLICA::quire#engine-m#abc"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (group(OURS), 'waiting for resources: 2 x {"GPU": 1.0} on one node (not free yet)'),
        (group(OURS, scheduling="INFEASIBLE"), '2 x {"GPU": 1.0} on one node (no node has as much)'),
        (group(OURS, strategy="PACK"), 'waiting for resources: 2 x {"GPU": 1.0} (not free yet)'),
        (group(OURS, state="CREATED"), ""),
        (group("SERVE_REPLICA::quire#engine-m2#abc"), ""),
        (group("SERVE_REPLICA::other#engine-m#abc"), ""),
    ],
)  # fmt: skip
def test_one_line_for_people(found: dict[str, Any], line: str) -> None:
    said = describe_waiting([found], "quire", "engine-m")
    assert said.endswith(line)
    assert bool(said) == bool(line)


def test_no_groups_nothing_awaited() -> None:
    assert describe_waiting([], "quire", "engine-m") == ""
