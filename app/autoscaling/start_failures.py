"""How often replicas of a deployment have failed to start, and why the last did, kept in Ray's control store.

Serve tells neither those who wait for a first replica nor an autoscaling policy: the replica itself leaves a note. It
outlives replicas and controller.
"""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

logger = logging.getLogger("ray.serve")

_NAMESPACE = b"quire"
_MAX_REASON = 500


class StartFailures(NamedTuple):
    """`number` only grows. `reason` is one line, of the last start; empty if that went well."""

    number: int = 0
    reason: str = ""


def read_start_failures(app_name: str, deployment_name: str) -> StartFailures:
    """Blocks for a call of Ray's control store. What cannot be read is none."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    try:
        if not _internal_kv_initialized():  # type: ignore[no-untyped-call]
            return StartFailures()
        found = _internal_kv_get(_key(app_name, deployment_name), namespace=_NAMESPACE)
        return StartFailures() if found is None else StartFailures(*json.loads(found))
    except Exception as error:
        # Those who ask look again.
        logger.debug("no note of failed starts: %s", error)
        return StartFailures()


def note_failed_start(app_name: str, deployment_name: str, error: BaseException) -> None:
    """A replica cannot start."""
    reason = " ".join((str(error) or type(error).__name__).split())[:_MAX_REASON]
    before = read_start_failures(app_name, deployment_name)
    _write(app_name, deployment_name, StartFailures(before.number + 1, reason))


def note_start(app_name: str, deployment_name: str) -> None:
    """A replica has started."""
    before = read_start_failures(app_name, deployment_name)
    if before.reason:
        _write(app_name, deployment_name, before._replace(reason=""))


def _write(app_name: str, deployment_name: str, failures: StartFailures) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    try:
        _internal_kv_put(_key(app_name, deployment_name), json.dumps(failures).encode(), namespace=_NAMESPACE)
    except Exception as error:
        # The start's own error matters more.
        logger.warning("no note of this start is kept: %s", error)


def _key(app_name: str, deployment_name: str) -> bytes:
    return f"start_failures/{app_name}/{deployment_name}".encode()
