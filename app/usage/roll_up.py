"""Adds closed segments to the days' totals.

The ledger's directory:

    segments/WRITER-000001.jsonl    being written, or not yet added
    days/2026-11-23.json            totals of a day, and which segments they have
    uncopied/WRITER-000001.jsonl    added, and to be copied
    kept/WRITER-000001.jsonl        done with
    roll_up.lock                    locked by the one process that adds

A day's file is replaced whole by a rename and names the segments that it has, so that a segment is added to each day
once, wherever a crash came between; only then it moves on. A reader takes segments first and days after them,
and of a segment what the day does not have yet: it misses nothing and counts nothing twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.usage.segment import (
    MAKING_SUFFIX,
    SUFFIX,
    close_abandoned,
    is_being_written,
    split_name,
    sync_folder,
    try_lock,
)
from app.usage.settings import UsageSettings
from app.usage.totals import SegmentUsage, Totals, UsageCounts, UsageKey, day_of, no_totals, segment_usage
from app.usage.writer import SEGMENTS, UsageStats
from engine.errors import QuireError

DAYS = "days"
UNCOPIED = "uncopied"
KEPT = "kept"
VERSION = 1
# Tenants may be as many as a header can name; a day's file has no more of them than this, and OTHERS.
MAX_KEYS = 20_000
# No tenant's name: those begin with a letter or a digit.
OTHERS = "(others)"

_LOCK = "roll_up.lock"
_LOCK_POLL_S = 0.05


@dataclass
class DayTotals:
    """A day's file.

    Attributes:
        segments: those that it has, each with its damaged lines if this is its first day.
    """

    totals: Totals = field(default_factory=no_totals)
    segments: dict[str, int] = field(default_factory=dict)

    def add(self, totals: Totals) -> None:
        """Add a segment's part of this day."""
        for key, counts in totals.items():
            known = key if key in self.totals or len(self.totals) < MAX_KEYS else key._replace(tenant=OTHERS)
            self.totals[known].add(counts)

    @classmethod
    def read(cls, path: Path) -> DayTotals:
        """What a day's file says; nothing if there is none. ValueError if it is no such file."""
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls()
        if content.get("version") != VERSION:
            raise ValueError(f"{path}: version {content.get('version')} is not known, only {VERSION}")
        day = cls(segments=content["segments"])
        for entry in content["totals"]:
            key = UsageKey(*(entry.pop(name) for name in UsageKey._fields))
            day.totals[key] = UsageCounts(**entry)
        return day

    def write(self, path: Path) -> None:
        """Replace a day's file whole."""
        totals = [{**key._asdict(), **asdict(counts)} for key, counts in sorted(self.totals.items())]
        content = {"version": VERSION, "segments": self.segments, "totals": totals}
        making = path.with_suffix(MAKING_SUFFIX)
        with making.open("w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        making.replace(path)
        sync_folder(path.parent)


def roll_up(
    settings: UsageSettings,
    stats: UsageStats,
    pace: Callable[[], None] | None = None,
    patience_s: float = 0.0,
) -> None:
    """Add what closed segments have, unless another process does so just now. Failures are counted, and tried again.

    Args:
        pace: called now and then, to let others go first.
        patience_s: how long to wait for another process to be done with it.
    """
    directory = settings.directory
    try:
        with contextlib.ExitStack() as stack:
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, lock)
            deadline = time.monotonic() + patience_s
            while not try_lock(lock, fcntl.LOCK_EX):
                if time.monotonic() >= deadline:
                    return
                time.sleep(_LOCK_POLL_S)
            for name in (DAYS, UNCOPIED, KEPT):
                (directory / name).mkdir(exist_ok=True)
            _remove_unfinished(directory)
            added_to = directory / (KEPT if settings.copy_to is None else UNCOPIED)
            for path in sorted((directory / SEGMENTS).glob("*" + SUFFIX)):
                if close_abandoned(path, lambda path=path: _has_next(directory, path.stem)):  # type: ignore[misc]
                    _add(directory, path, pace)
                    path.rename(added_to / path.name)
            if settings.copy_to is not None:
                _copy(directory, settings.copy_to, stats)
            _remove_old(directory, settings.keep_days)
    except (OSError, ValueError, KeyError, TypeError) as error:
        stats.failed("roll_up", f"{directory} cannot be rolled up", error)
        return
    stats.went_well("roll_up")


def read_unclosed(directory: Path, path: Path) -> SegmentUsage:
    """Add up a segment that nobody may have closed, without changing anything."""
    is_live = is_being_written(path)
    with path.open("rb") as file:
        # The last line may be half written just now.
        lines = (line for line in file if line.endswith(b"\n") or not is_live)
        return segment_usage(lines, goes_on=is_live or _has_next(directory, path.stem))


def _add(directory: Path, path: Path, pace: Callable[[], None] | None) -> None:
    """Add a closed segment to each of its days that does not have it."""
    with path.open("rb") as lines:
        usage = segment_usage(lines, pace=pace)
    days = usage.days
    if usage.num_damaged and not days:
        days = {day_of(path.stat().st_mtime): no_totals()}
    for number, day in enumerate(sorted(days)):
        file = directory / DAYS / f"{day}.json"
        has = DayTotals.read(file)
        if path.stem in has.segments:
            continue
        has.add(days[day])
        has.segments[path.stem] = usage.num_damaged if number == 0 else 0
        has.write(file)


def _copy(directory: Path, url: str, stats: UsageStats) -> None:
    """Copy what is to be copied; a failure leaves it for the next time."""
    waiting = sorted((directory / UNCOPIED).glob("*" + SUFFIX))
    if not waiting:
        return
    # Imported here: boto3 is not for those who copy nothing.
    from app.usage.copies import SegmentStore

    try:
        store = SegmentStore(url)
        for path in waiting:
            store.put(path)
            path.rename(directory / KEPT / path.name)
    except QuireError as error:
        stats.failed("copy", "segments cannot be copied", error)
        return
    stats.went_well("copy")


def _has_next(directory: Path, name: str) -> bool:
    """Whether a segment's writer has begun another after it."""
    writer, number = split_name(name)
    others = (path.stem for folder in (SEGMENTS, UNCOPIED, KEPT) for path in (directory / folder).glob("*" + SUFFIX))
    return any(other.startswith(writer) and split_name(other) > (writer, number) for other in others)


def _remove_unfinished(directory: Path) -> None:
    """What a crash has left of files that had not come into being."""
    for path in (directory / SEGMENTS).glob("*" + MAKING_SUFFIX):
        with contextlib.suppress(FileNotFoundError):
            if not is_being_written(path):
                path.unlink()


def _remove_old(directory: Path, keep_days: float | None) -> None:
    if keep_days is None:
        return
    oldest = time.time() - keep_days * 86400.0
    for path in (directory / KEPT).glob("*" + SUFFIX):
        if path.stat().st_mtime < oldest:
            path.unlink()
