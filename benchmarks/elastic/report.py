"""What a run is judged by: first tokens over time, refusals, and replicas over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.elastic.workload import ElasticRequest

# So large a share of the first tokens is to keep the target.
_SHARE = 0.95


class Run(NamedTuple):
    """One policy's run. Times are seconds from the load's beginning.

    Attributes:
        requests, ttft_s: when each request came, and how long its first token took; infinite if it failed.
        refused: of the failed ones, those that were refused (429).
        lives: (asked for, ready, gone) of each replica.
        decisions: (when, what) as the policy has said it.
    """

    requests: Sequence[ElasticRequest]
    ttft_s: Sequence[float]
    refused: Sequence[bool]
    lives: Sequence[tuple[float, float, float]]
    decisions: Sequence[tuple[float, str]] = ()

    @property
    def replica_s(self) -> float:
        """Seconds that replicas held resources: starting, running and draining."""
        return sum(gone - asked for asked, _, gone in self.lives)


def late_ttft_s(ttft_s: Sequence[float]) -> float:
    """The 95th percentile of first tokens; infinite if so many failed."""
    ordered = sorted(ttft_s)
    return ordered[min(int(_SHARE * len(ordered)), len(ordered) - 1)]


def summary(run: Run, window: tuple[float, float]) -> dict[str, Any]:
    """A policy's entry in the JSON line; `window` is the time of the ramp and of the plateau after it."""
    answered = sorted(ttft for ttft in run.ttft_s if ttft < math.inf)
    inside = [
        ttft for request, ttft in zip(run.requests, run.ttft_s, strict=True) if window[0] <= request.due_s <= window[1]
    ]
    starts = [ready - asked for asked, ready, _ in run.lives if ready < math.inf]
    return {
        "requests": len(run.ttft_s),
        "refused": sum(run.refused),
        "failed": len(run.ttft_s) - len(answered) - sum(run.refused),
        "first_answer_s": _rounded(run.ttft_s[0]),
        "ttft_p50_s": _rounded(answered[len(answered) // 2]),
        "ttft_p95_s": _rounded(late_ttft_s(run.ttft_s)),
        "ramp_ttft_p95_s": _rounded(late_ttft_s(inside)),
        "replica_s": _rounded(run.replica_s),
        "max_replicas": max(count for _, count in replicas_over_time(run.lives)),
        "starts": len(run.lives),
        "start_s": _rounded(sum(starts) / len(starts)) if starts else None,
    }


def replicas_over_time(lives: Sequence[tuple[float, float, float]], *, ready: bool = False) -> list[tuple[float, int]]:
    """(second, replicas from then on): those that hold resources, or those that take requests until they are gone."""
    changes = []
    for asked, up, gone in lives:
        begin = up if ready else asked
        if begin < math.inf:
            changes += [(begin, 1), (gone, -1)]
    count, points = 0, [(0.0, 0)]
    for at_s, change in sorted(changes):
        count += change
        points.append((at_s, count))
    return points


def timeline(run: Run, step_s: float = 2.0) -> list[dict[str, Any]]:
    """The run in steps: what came, how late first tokens were, what was refused, and replicas at the step's end."""
    end_s = max([request.due_s for request in run.requests] + [gone for *_, gone in run.lives if gone < math.inf])
    held, ready = replicas_over_time(run.lives), replicas_over_time(run.lives, ready=True)
    steps = []
    for number in range(int(end_s / step_s) + 1):
        begin, end = number * step_s, (number + 1) * step_s
        indexes = [index for index, request in enumerate(run.requests) if begin <= request.due_s < end]
        ttft = [run.ttft_s[index] for index in indexes if run.ttft_s[index] < math.inf]
        steps.append(
            {
                "s": begin,
                "requests": len(indexes),
                "ttft_p95_s": _rounded(late_ttft_s(ttft)) if ttft else None,
                "refused": sum(run.refused[index] for index in indexes),
                "replicas": _at(held, end),
                "ready": _at(ready, end),
            }
        )
    return steps


def _at(points: Sequence[tuple[float, int]], now_s: float) -> int:
    return [count for at_s, count in points if at_s <= now_s][-1]


def _rounded(value: float) -> float | None:
    return round(value, 3) if value < math.inf else None
