"""What clients met: first tokens, refusals, and whether what they were told held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.overload.workload import Coming
from benchmarks.routing.report import quantile


@dataclass(slots=True)
class Try:
    """One time that a client asked. `sent_s` from the start; `attempt` is 0 for the first time.

    `retry_after_s` is set if it was refused, and `refusal` says why; `error` if it was neither served nor refused.
    """

    coming: Coming
    attempt: int
    sent_s: float
    ttft_s: float | None = None
    end_s: float | None = None
    retry_after_s: int | None = None
    refusal: str | None = None
    error: str | None = None

    @property
    def admitted(self) -> bool:
        return self.ttft_s is not None


def phase_summary(tries: Sequence[Try], began_s: float, seconds: float, ttft_target_s: float) -> dict[str, Any]:
    """What came in a phase, retries of earlier refusals included."""
    inside = [one for one in tries if began_s <= one.sent_s < began_s + seconds]
    first = [one for one in inside if one.attempt == 0]
    again = [one for one in inside if one.attempt > 0]
    ttft = sorted(one.ttft_s for one in inside if one.ttft_s is not None)
    told = sorted(one.retry_after_s for one in inside if one.retry_after_s is not None)
    return {
        "first_tries": len(first),
        "refused": sum(not one.admitted for one in first),
        "retries": len(again),
        "retries_refused": sum(not one.admitted for one in again),
        "errors": sum(one.error is not None for one in inside),
        **_ttft(ttft, ttft_target_s),
        "retry_after_p50_s": quantile([float(after) for after in told], 0.5) if told else None,
        "retry_after_max_s": told[-1] if told else None,
    }


def tenant_summary(tries: Sequence[Try], ttft_target_s: float) -> dict[str, Any]:
    """What one tenant's requests met."""
    ttft = sorted(one.ttft_s for one in tries if one.ttft_s is not None)
    latency = sorted(one.end_s - one.sent_s for one in tries if one.ttft_s is not None and one.end_s is not None)
    return {
        "tries": len(tries),
        "refused": sum(not one.admitted for one in tries),
        **_ttft(ttft, ttft_target_s),
        "latency_mean_s": round(sum(latency) / len(latency), 4) if latency else None,
        "latency_p95_s": round(quantile(latency, 0.95), 4) if latency else None,
    }


def retry_summary(tries: Sequence[Try]) -> dict[str, Any]:
    """Of those who came again when they were told to, how many were let in, and served by their deadline."""
    again = [one for one in tries if one.attempt > 0]
    admitted = sum(one.admitted for one in again)
    return {
        "retries": len(again),
        "admitted": admitted,
        "admitted_share": round(admitted / len(again), 4) if again else None,
    }


def _ttft(ttft: list[float], target_s: float) -> dict[str, Any]:
    if not ttft:
        return {"admitted": 0}
    return {
        "admitted": len(ttft),
        "ttft_mean_s": round(sum(ttft) / len(ttft), 4),
        "ttft_p50_s": round(quantile(ttft, 0.5), 4),
        "ttft_p95_s": round(quantile(ttft, 0.95), 4),
        "ttft_max_s": round(ttft[-1], 4),
        "in_time_share": round(sum(one <= target_s for one in ttft) / len(ttft), 4),
    }
