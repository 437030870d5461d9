"""How often the policy has decided what, kept in Ray's control store, where every ingress can read it.

Decisions fall in Serve's controller, which answers no scrape. They are rare, so each is written when it falls, and
whoever is asked for `/metrics` reads. The counts outlive the controller and a new version of the application.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

logger = logging.getLogger("ray.serve")

_NAMESPACE = b"quire"

# Direction and cause → decisions.
DecisionCounts = Mapping[tuple[str, str], int]

# What app.autoscaling.sizing decides, counted from zero, so that the first of each is seen as an increase. "minimum":
# more are configured than there are.
NO_DECISIONS: DecisionCounts = {
    **{("up", cause): 0 for cause in ("prompts", "queue", "sequences", "kv", "minimum")},
    **{("down", cause): 0 for cause in ("spare", "idle", "failed")},
}


def read_decisions(app_name: str, deployment_name: str) -> DecisionCounts:
    """Of a deployment; empty if it does not autoscale. Blocks for a call of Ray's control store."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
        return {}
    found = _internal_kv_get(_key(app_name, deployment_name), namespace=_NAMESPACE)
    return {} if found is None else decode_counts(found)


def write_decisions(app_name: str, deployment_name: str, counts: DecisionCounts) -> None:
    """Keep them for whoever reads. Blocks for a call; where Ray does not run, as in a simulation, nothing is kept."""
    from ray.experimental.internal_kv import _internal_kv_initialized, _internal_kv_put

    if _internal_kv_initialized():  # type: ignore[no-untyped-call]
        _internal_kv_put(_key(app_name, deployment_name), encode_counts(counts), namespace=_NAMESPACE)


class DecisionCounter:
    """Counts the decisions of one deployment, going on from where an earlier controller had come to."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] | None = None

    def begin(self, app_name: str, deployment_name: str) -> None:
        """Make known what was counted before, and zero of all else; only the first call does anything."""
        if self._counts is None:
            self._counts = dict(NO_DECISIONS)
            self._keep(app_name, deployment_name, resume=True)

    def count(self, app_name: str, deployment_name: str, direction: str, cause: str) -> None:
        """One decision more, after `begin`. What cannot be written now is written with the next."""
        assert self._counts is not None
        self._counts[direction, cause] = self._counts.get((direction, cause), 0) + 1
        self._keep(app_name, deployment_name)

    def _keep(self, app_name: str, deployment_name: str, resume: bool = False) -> None:
        assert self._counts is not None
        try:
            if resume:
                self._counts.update(read_decisions(app_name, deployment_name))
            write_decisions(app_name, deployment_name, self._counts)
        except Exception as error:
            # Scaling matters more than its figures.
            logger.warning("the counts of scaling decisions of %s are not kept: %s", deployment_name, error)


def encode_counts(counts: DecisionCounts) -> bytes:
    """As the control store keeps them."""
    return json.dumps([[*key, value] for key, value in counts.items()]).encode()


def decode_counts(data: bytes) -> DecisionCounts:
    """Back from there."""
    return {(direction, cause): int(value) for direction, cause, value in json.loads(data)}


def _key(app_name: str, deployment_name: str) -> bytes:
    return f"scaling_decisions/{app_name}/{deployment_name}".encode()
