"""What tenants used of models: counts, by day, and how a segment's records add up to them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from app.usage.records import SegmentEnd, SegmentStart, UsageRecord
from app.usage.segment import decode_lines

# Between these the one who reads may let others go first.
_LINES_AT_ONCE = 128


class UsageKey(NamedTuple):
    """Whose usage of what; `adapter` is empty for the model itself."""

    tenant: str
    model: str
    adapter: str


@dataclass(slots=True)
class UsageCounts:
    """How much.

    Attributes:
        requests: that were sound and went to a model.
        unserved: of these, those that ended without a token: refused, failed or left. Their prompts are not counted.
        interrupted: of these, those whose ingress ended first; their tokens are those that it had noted.
        cached_tokens: of the prompt tokens, those found in a prefix cache.
    """

    requests: int = 0
    unserved: int = 0
    interrupted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    def count(self, record: UsageRecord) -> None:
        """Add a request by the last record of it."""
        self.requests += 1
        self.interrupted += record.kind != "end"
        if record.output_tokens == 0:
            self.unserved += 1
            return
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.output_tokens += record.output_tokens

    def add(self, other: UsageCounts) -> None:
        """Add all counts of another."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


COUNTS = tuple(field.name for field in fields(UsageCounts))

Totals = dict[UsageKey, UsageCounts]


def no_totals() -> Totals:
    """To count into."""
    return defaultdict(UsageCounts)


def day_of(at: float) -> str:
    """The day in UTC of Unix seconds, as `2026-11-23`."""
    return _day(int(at // 86400))


@lru_cache(maxsize=16)
def _day(number: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(number * 86400))


class SegmentUsage(NamedTuple):
    """What a segment says.

    Attributes:
        days: by the day on which each request ended.
        began: Unix seconds; None if its first line is damaged.
        num_open: requests that still run, or go on in the next segment; not in `days`.
        num_damaged: lines that could not be read.
        num_records: lines that are a request's.
    """

    days: dict[str, Totals]
    began: float | None
    num_open: int
    num_damaged: int
    num_records: int


def segment_usage(
    lines: Iterable[bytes], *, goes_on: bool = False, pace: Callable[[], None] | None = None
) -> SegmentUsage:
    """Add up a segment's lines.

    Args:
        goes_on: of one that is not closed: its requests that have no end run still, or are in the next one.
        pace: called now and then, to let others go first.
    """
    days: dict[str, Totals] = defaultdict(no_totals)
    running: dict[str, UsageRecord] = {}
    began: float | None = None
    damaged = records = 0
    for number, line in enumerate(decode_lines(lines), 1):
        if isinstance(line, UsageRecord):
            records += 1
            if line.kind == "end":
                running.pop(line.request_id, None)
                _count(days, line)
            else:
                running[line.request_id] = line
        elif isinstance(line, SegmentStart):
            began = line.at
        elif isinstance(line, SegmentEnd):
            goes_on = line.carried
        else:
            damaged += 1
        if pace is not None and number % _LINES_AT_ONCE == 0:
            pace()
    if not goes_on:
        for record in running.values():
            _count(days, record)
        running.clear()
    return SegmentUsage(dict(days), began, len(running), damaged, records)


def _count(days: dict[str, Totals], record: UsageRecord) -> None:
    days[day_of(record.at)][UsageKey(record.tenant, record.model, record.adapter)].count(record)
