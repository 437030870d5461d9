"""What a run is judged by."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.routing.simulation import Outcome

# Requests that had their first token within this, and their tokens at this pace, count as good.
GOOD_TTFT_S = 5.0
GOOD_TPOT_S = 0.05


def summary(outcome: Outcome) -> dict[str, Any]:
    """A policy's entry in the JSON line."""
    num_requests = len(outcome.ttft_s)
    ttft = sorted(outcome.ttft_s)
    tpot = sorted(outcome.tpot_s)
    decisions = sorted(outcome.decision_us)
    good = sum(
        first <= GOOD_TTFT_S and pace <= GOOD_TPOT_S for first, pace in zip(outcome.ttft_s, outcome.tpot_s, strict=True)
    )
    mean_busy_s = math.fsum(outcome.busy_s) / len(outcome.busy_s)
    return {
        "requests": num_requests,
        "hit_rate": round(outcome.cached_tokens / outcome.prompt_tokens, 4),
        "ttft_mean_s": round(math.fsum(ttft) / num_requests, 4),
        "ttft_p50_s": round(quantile(ttft, 0.5), 4),
        "ttft_p90_s": round(quantile(ttft, 0.9), 4),
        "ttft_p99_s": round(quantile(ttft, 0.99), 4),
        "tpot_p50_s": round(quantile(tpot, 0.5), 5),
        "tpot_p99_s": round(quantile(tpot, 0.99), 5),
        "goodput_rps": round(good / outcome.end_s, 3),
        "imbalance": round(max(outcome.busy_s) / mean_busy_s, 3),
        "misjudged": round(outcome.misjudged_requests / num_requests, 4),
        "decisions_per_s": round(num_requests / ((math.fsum(decisions) + outcome.dispatch_us) / 1e6)),
        "decision_p99_us": round(quantile(decisions, 0.99), 1),
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value that so large a share of an ascending list lies below."""
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results for people: a line a policy."""
    columns = [
        *("hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s"),
        *("goodput_rps", "imbalance", "misjudged", "decisions_per_s", "decision_p99_us"),
    ]
    lines = [f"{'policy':<18}" + "".join(f"{column:>17}" for column in columns)]
    lines += [
        f"{name:<18}" + "".join(f"{result[column]:>17}" for column in columns) for name, result in results.items()
    ]
    return "\n".join(lines)
