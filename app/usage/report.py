"""What was used, from a ledger's directory or a bucket that has its segments: by day, tenant, model or adapter."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.usage.copies import SegmentStore
from app.usage.roll_up import DAYS, DayTotals, read_unclosed
from app.usage.segment import SUFFIX
from app.usage.settings import SCHEME
from app.usage.totals import COUNTS, SegmentUsage, Totals, UsageCounts, no_totals, segment_usage
from app.usage.writer import SEGMENTS
from engine.errors import ConfigError

GROUPS = ("day", "tenant", "model", "adapter")


@dataclass
class Usage:
    """All that a ledger knows.

    Attributes:
        days: totals by the day, in UTC, on which requests ended.
        num_open: requests that still run, which are not in the totals.
        num_damaged: lines that could not be read.
    """

    days: dict[str, Totals] = field(default_factory=dict)
    num_open: int = 0
    num_damaged: int = 0

    def add(self, day: str, totals: Totals) -> None:
        """More of a day."""
        mine = self.days.setdefault(day, no_totals())
        for key, counts in totals.items():
            mine[key].add(counts)


def read_usage(where: str) -> Usage:
    """Read a directory, which may be in use, or `s3://BUCKET[/PREFIX]`. Changes nothing.

    Raises:
        ConfigError: there is no ledger, or it cannot be read; ModelLoadError: S3 does not do what it is asked.
    """
    return _read_bucket(where) if where.startswith(SCHEME) else _read_directory(Path(where))


def _read_bucket(url: str) -> Usage:
    store, usage = SegmentStore(url), Usage()
    for item in store.list():
        told = segment_usage(store.lines(item))
        usage.num_damaged += told.num_damaged
        for day, totals in told.days.items():
            usage.add(day, totals)
    return usage


def _read_directory(directory: Path) -> Usage:
    if not (directory / SEGMENTS).is_dir():
        raise ConfigError(f"{directory} is no usage ledger: it has no folder {SEGMENTS!r}")
    usage = Usage()
    try:
        # Segments first, days after them: what is added meanwhile is then found in the days.
        segments: dict[str, SegmentUsage] = {}
        for path in sorted((directory / SEGMENTS).glob("*" + SUFFIX)):
            try:
                segments[path.stem] = read_unclosed(directory, path)
            except FileNotFoundError:
                continue
        days = {path.stem: DayTotals.read(path) for path in sorted((directory / DAYS).glob("*.json"))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{directory} cannot be read: {error}") from error
    counted: set[str] = set()
    for day, has in days.items():
        usage.add(day, has.totals)
        usage.num_damaged += sum(has.segments.values())
        counted |= has.segments.keys()
    for name, told in segments.items():
        usage.num_open += told.num_open
        usage.num_damaged += 0 if name in counted else told.num_damaged
        for day, totals in told.days.items():
            if day not in days or name not in days[day].segments:
                usage.add(day, totals)
    return usage


Row = tuple[tuple[str, ...], UsageCounts]


def rows(usage: Usage, by: Sequence[str], since: str = "", until: str = "9999") -> list[Row]:
    """Totals grouped by some of GROUPS, sorted; of the days from `since` to `until`, both included.

    Raises:
        ConfigError: a group is none.
    """
    if unknown := [name for name in by if name not in GROUPS]:
        raise ConfigError(f"--by: {unknown[0]!r} is none of {', '.join(GROUPS)}")
    grouped: dict[tuple[str, ...], UsageCounts] = {}
    for day, totals in usage.days.items():
        if since <= day <= until:
            for key, counts in totals.items():
                named = {"day": day, **key._asdict()}
                grouped.setdefault(tuple(named[name] for name in by), UsageCounts()).add(counts)
    return sorted(grouped.items(), key=lambda row: row[0])


def as_json(by: Sequence[str], found: Iterable[Row], usage: Usage) -> str:
    """One object: `usage`, a list with an object a row; and what is not in it."""
    entries: list[dict[str, Any]] = [{**dict(zip(by, group, strict=True)), **asdict(counts)} for group, counts in found]
    content = {"usage": entries, "open_requests": usage.num_open, "damaged_lines": usage.num_damaged}
    return json.dumps(content, indent=1)


def as_csv(by: Sequence[str], found: Iterable[Row]) -> str:
    """A header, then a line a row."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*by, *COUNTS])
    for group, counts in found:
        table.writerow([*group, *(getattr(counts, name) for name in COUNTS)])
    return text.getvalue()
