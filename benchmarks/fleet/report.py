"""What a replay shows, in the trace's time, and beside it what the simulated fleet says of the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.cpu.requests import Request
from benchmarks.routing.report import quantile
from benchmarks.serving.client import StreamRecord


def replay_summary(requests: Sequence[Request], records: Sequence[StreamRecord], speed: float) -> dict[str, Any]:
    """One router's entry in the JSON line. Times are of the trace: the replay's times `speed`.

    Raises:
        ValueError: no request was answered.
    """
    answered = [(request, record) for request, record in zip(requests, records, strict=True) if record.error is None]
    if not answered:
        raise ValueError(f"no request was answered: {records[0].error}")
    ttft = sorted(record.ttft_s * speed for _, record in answered)
    prompt_tokens = sum(len(request.prompt) for request, _ in answered)
    return {
        "requests": len(records),
        "failed": len(records) - len(answered),
        "hit_rate": round(sum(record.num_cached_tokens for _, record in answered) / prompt_tokens, 4),
        "ttft_mean_s": round(sum(ttft) / len(ttft), 4),
        "ttft_p50_s": round(quantile(ttft, 0.5), 4),
        "ttft_p90_s": round(quantile(ttft, 0.9), 4),
        "ttft_p99_s": round(quantile(ttft, 0.99), 4),
    }


def ratios(real: dict[str, Any], simulated: dict[str, Any]) -> dict[str, float]:
    """Real replicas over the simulated fleet, figure by figure."""
    names = ("hit_rate", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s")
    return {name: round(real[name] / simulated[name], 3) for name in names if simulated[name]}


def markdown(replays: dict[str, dict[str, Any]]) -> str:
    """A table of all routers, the quickest first."""
    lines = ["| router | hit rate | p50 s | p90 s | p99 s | mean TTFT s |", "|---|---|---|---|---|---|"]
    for name, entry in sorted(replays.items(), key=lambda item: float(item[1]["ttft_mean_s"])):
        lines.append(
            f"| {name} | {entry['hit_rate']:.3f} | {entry['ttft_p50_s']:.2f} | {entry['ttft_p90_s']:.2f} "
            f"| {entry['ttft_p99_s']:.1f} | {entry['ttft_mean_s']:.2f} |"
        )
    return "\n".join(lines)
