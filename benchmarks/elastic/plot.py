"""One picture of a run: load and replicas above, first tokens and refusals below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.elastic.least import Least
from benchmarks.elastic.report import Run, replicas_over_time
from benchmarks.elastic.workload import ElasticRequest, Prices


def draw(path: Path, run: Run, prices: Prices, ttft_target_s: float, least: Least | None, title: str) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 2))
    seconds, work = _work_over_time(run.requests, prices)
    above.fill_between(seconds, work, step="mid", color="0.85", label="prompts asked for, in replicas")
    for ready, style, label in ((False, "C0-", "replicas, starting and draining ones too"), (True, "C2--", "ready")):
        points = replicas_over_time(run.lives, ready=ready)
        above.step([at for at, _ in points], [count for _, count in points], style, where="post", label=label)
    if least is not None:
        at_s = [index * least.period_s for index in range(len(least.numbers))]
        above.step(at_s, least.numbers, "C3:", where="post", label="least, knowing all arrivals")
    above.set_ylabel("replicas")
    above.legend(loc="upper left", fontsize=8)
    above.set_title(title, fontsize=10)
    answered = [
        (request.due_s, ttft) for request, ttft in zip(run.requests, run.ttft_s, strict=True) if ttft < math.inf
    ]
    below.plot([due for due, _ in answered], [ttft for _, ttft in answered], "C0.", markersize=2, label="first token")
    refused = [request.due_s for request, was in zip(run.requests, run.refused, strict=True) if was]
    below.plot(refused, [ttft_target_s] * len(refused), "rx", label=f"refused ({len(refused)})")
    below.axhline(ttft_target_s, color="C3", linewidth=0.8, label="target for 95 of 100")
    below.set_ylabel("seconds")
    below.set_xlabel("seconds from the load's beginning")
    below.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _work_over_time(requests: Sequence[ElasticRequest], prices: Prices) -> tuple[list[float], list[float]]:
    """Replicas' worth of prompts that came in each second."""
    work = [0.0] * (int(max(request.due_s for request in requests)) + 2)
    for request in requests:
        work[int(request.due_s)] += request.num_prompt / prices.prefill_tokens_per_s
    return [second + 0.5 for second in range(len(work))], work
