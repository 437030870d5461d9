"""Route receipts: where a request went, and how what the balancer expected of it compares with what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.balancer import RouteReceipt
from engine.errors import RequestError

# Asks for the receipts of a request, in its answer under FIELD.
HEADER = "x-quire-receipt"
FIELD = "quire_receipts"


@dataclass(slots=True)
class Receipt:
    """Of one engine request, the last attempt at it; filled in as it is served.

    Attributes:
        replica: its id in Serve; None until it was placed.
        expected_cached_tokens, cached_tokens: of the prompt, as the balancer's index had it and as the engine found it.
        predicted_wait_s, wait_s: from its placement on that replica to its first step there.
        predicted_adapter_s: until its adapter could be used there, 0 where it was resident or nearly so; `wait_s` has
            it in it.
        predicted_cost_s: what the balancer chose by; seconds for policies that count in them.
        request_class, queued_s: on whose terms it waited in the ingress, and for how long, before its last submission.
        num_attempts: submissions, more than one if a replica was lost or drained.
    """

    request_id: str
    replica: str | None = None
    expected_cached_tokens: int | None = None
    cached_tokens: int | None = None
    predicted_wait_s: float | None = None
    wait_s: float | None = None
    predicted_adapter_s: float | None = None
    predicted_cost_s: float | None = None
    num_attempts: int = 0
    request_class: str | None = None
    queued_s: float | None = None

    def placed(self, route: RouteReceipt | None, attempt: int) -> None:
        """The first tokens of an attempt have come: what its choice rested on."""
        self.num_attempts = attempt
        if route is not None:
            self.replica = route.replica_id
            self.expected_cached_tokens = route.cached_tokens
            self.predicted_wait_s = route.wait_s
            self.predicted_adapter_s = route.adapter_s
            self.predicted_cost_s = route.cost_s

    def as_dict(self) -> dict[str, Any]:
        """As the answer has it, times in milliseconds' precision."""
        return {
            "request_id": self.request_id,
            "replica": self.replica,
            "expected_cached_tokens": self.expected_cached_tokens,
            "cached_tokens": self.cached_tokens,
            "predicted_wait_s": _rounded(self.predicted_wait_s),
            "wait_s": _rounded(self.wait_s),
            "predicted_adapter_s": _rounded(self.predicted_adapter_s),
            "predicted_cost_s": _rounded(self.predicted_cost_s),
            "num_attempts": self.num_attempts,
            "class": self.request_class,
            "queued_s": _rounded(self.queued_s),
        }


def wants_receipt(value: str | None) -> bool:
    """What the header's value asks for. RequestError if it is neither 0 nor 1."""
    if value in (None, "", "0", "1"):
        return value == "1"
    raise RequestError(f"{HEADER}: {value!r} must be 0 or 1", param=HEADER, code="invalid_value")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
