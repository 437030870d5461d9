"""What a run's records say: rates, percentiles, goodput."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.client import StreamRecord


class Objectives(NamedTuple):
    """A request is good if its first token, and its mean time a token, are no later than this."""

    ttft_s: float
    tpot_s: float


class HttpRun(NamedTuple):
    """One run over HTTP. `cpu_s` is of the server and this process; None where the server is not on this machine.
    `busiest_s` is the part of that process which used most, the engine's."""

    records: list[StreamRecord]
    seconds: float
    cpu_s: float | None
    busiest_s: float = 0.0

    @property
    def num_output_tokens(self) -> int:
        return sum(record.num_output_tokens for record in self.records)

    @property
    def out_tok_s(self) -> float:
        return self.num_output_tokens / self.seconds


class OfflineRun(NamedTuple):
    """The same requests through the engine alone."""

    num_output_tokens: int
    seconds: float
    cpu_s: float

    @property
    def out_tok_s(self) -> float:
        return self.num_output_tokens / self.seconds


class FirstTokens(NamedTuple):
    """Seconds to one prompt's first token, over HTTP and of the engine alone, measured one right after the other."""

    http_s: float
    alone_s: float


def serving_tax_ms(http: HttpRun, offline: OfflineRun) -> float | None:
    """Core-milliseconds that serving adds to an output token."""
    if http.cpu_s is None or not http.num_output_tokens:
        return None
    # Both generate the same number of tokens unless requests failed; then the engine's share is scaled.
    engine_s = offline.cpu_s * http.num_output_tokens / offline.num_output_tokens
    return (http.cpu_s - engine_s) / http.num_output_tokens * 1e3


def summary(
    http: Sequence[HttpRun], offline: Sequence[OfflineRun], objectives: Objectives, idle_cores: float | None = None
) -> dict[str, Any]:
    """The result's JSON: medians over runs, percentiles over all their requests.

    `core_ms_per_token_error` is the standard error of the tax's mean over runs.

    Args:
        idle_cores: what the server uses with nothing to do.
    """
    good_records = [record for run in http for record in run.records if record.error is None]
    failed = [record for run in http for record in run.records if record.error is not None]
    ttft = [record.ttft_s for record in good_records]
    tpot = [seconds for record in good_records if (seconds := record.tpot_s) is not None]
    gaps = [later - earlier for record in good_records for earlier, later in itertools.pairwise(record.event_s)]
    good = [
        record
        for record in good_records
        if record.ttft_s <= objectives.ttft_s and (record.tpot_s or 0.0) <= objectives.tpot_s
    ]
    taxes = [tax for run, alone in zip(http, offline, strict=False) if (tax := serving_tax_ms(run, alone)) is not None]
    if idle_cores is None:
        busy = []
    else:
        idle_ms = [idle_cores * run.seconds / run.num_output_tokens * 1e3 for run in http]
        busy = [tax - idle for tax, idle in zip(taxes, idle_ms, strict=False)]
    beside = [
        (run.cpu_s - run.busiest_s) / run.num_output_tokens * 1e3
        for run in http
        if run.cpu_s is not None and run.busiest_s and run.num_output_tokens
    ]
    rates = [run.out_tok_s / alone.out_tok_s for run, alone in zip(http, offline, strict=False)]
    seconds = sum(run.seconds for run in http)
    return {
        "out_tok_s": _median([run.out_tok_s for run in http]),
        "ttft_p50_s": _percentile(ttft, 50),
        "ttft_p99_s": _percentile(ttft, 99),
        "tpot_p50_s": _percentile(tpot, 50),
        "offline_ratio": _median(rates),
        "core_ms_per_token": _median(taxes),
        "core_ms_per_token_error": statistics.stdev(taxes) / len(taxes) ** 0.5 if len(taxes) > 1 else None,
        "beside_core_ms_per_token": _median(beside),
        "busy_core_ms_per_token": _median(busy),
        "idle_cores": idle_cores,
        "tpot_p99_s": _percentile(tpot, 99),
        "gap_p50_s": _percentile(gaps, 50),
        "gap_p99_s": _percentile(gaps, 99),
        "e2e_p50_s": _percentile([record.end_s - record.due_s for record in good_records], 50),
        "e2e_p99_s": _percentile([record.end_s - record.due_s for record in good_records], 99),
        "goodput_req_s": len(good) / seconds,
        "goodput_share": len(good) / max(1, len(good_records) + len(failed)),
        "objectives": objectives._asdict(),
        "offline_tok_s": _median([run.out_tok_s for run in offline]),
        "core_ms_per_token_runs": [round(tax, 4) for tax in taxes],
        "out_tok_s_runs": [round(run.out_tok_s, 2) for run in http],
        "num_requests": len(good_records) + len(failed),
        "num_failed": len(failed),
        "num_output_tokens": sum(run.num_output_tokens for run in http),
        "num_events": sum(record.num_events for record in good_records),
        "errors": sorted({str(record.error) for record in failed})[:5],
    }


def first_token_summary(pairs: Sequence[FirstTokens]) -> dict[str, Any]:
    """What serving adds to the first token: the median of the pairs' differences, and how far they scatter."""
    added = [pair.http_s - pair.alone_s for pair in pairs]
    return {
        "added_ttft_p50_s": _median(added),
        "added_ttft_p25_s": _percentile(added, 25),
        "added_ttft_p75_s": _percentile(added, 75),
        "paired_http_p50_s": _median([pair.http_s for pair in pairs]),
        "paired_alone_p50_s": _median([pair.alone_s for pair in pairs]),
        "num_pairs": len(pairs),
    }


def used_seconds(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float]
) -> dict[tuple[int, str], float]:
    """CPU seconds between two readings, by process; one that has begun meanwhile counts from nothing.

    Ray's workers change their titles, which say what they do.
    """
    earlier = {pid: seconds for (pid, _), seconds in before.items()}
    return {(pid, title): seconds - earlier.get(pid, 0.0) for (pid, title), seconds in after.items()}


def process_lines(before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float]) -> Iterator[str]:
    """CPU seconds by process, the busiest first."""
    used = used_seconds(before, after)
    for (pid, title), seconds in sorted(used.items(), key=lambda item: -item[1]):
        if seconds >= 0.02:
            yield f"  {seconds:8.2f} s  {pid:>7}  {title}"


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
