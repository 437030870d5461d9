"""What the failure of a Serve call says: the request's fault, the replica's, or the request's end."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RaySystemError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from engine.errors import AdapterUnavailableError, EngineDeadError, OverloadedError, QuireError

_OUTAGES = (RayActorError, WorkerCrashedError, NodeDiedError, RaySystemError, ObjectLostError)

Verdict = Literal["outage", "overload", "final"]


class CallFailure(NamedTuple):
    """`verdict` "outage": another replica may do it; "overload": another may, which has room or the adapter, if there
    is one; "final": tell the reader."""

    verdict: Verdict
    error: QuireError


def classify(error: Exception) -> CallFailure:
    """Judge what `await response` raised. Ray wraps what a replica raised; its `cause` is the original."""
    cause = getattr(error, "cause", None)
    for candidate in (cause, error):
        if isinstance(candidate, EngineDeadError):
            return CallFailure("outage", candidate)
        if isinstance(candidate, OverloadedError | AdapterUnavailableError):
            return CallFailure("overload", candidate)
        if isinstance(candidate, QuireError):
            return CallFailure("final", candidate)
        if isinstance(candidate, _OUTAGES):
            return CallFailure("outage", EngineDeadError(type(candidate).__name__))
    if isinstance(error, RequestCancelledError):
        return CallFailure("final", EngineDeadError("the request's call was cancelled"))
    if isinstance(error, BackPressureError):
        return CallFailure("final", OverloadedError(str(error)))
    if isinstance(error, DeploymentUnavailableError):
        # Serve has given the deployment up, for now or until it is deployed again.
        message = "the model's replicas could not start; the server's log and /health say why"
        return CallFailure("final", EngineDeadError(message))
    return CallFailure("final", QuireError(f"the replica failed: {type(error).__name__}: {error}"))
