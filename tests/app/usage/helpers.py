"""Requests and directories of the ledger's tests."""

from __future__ import annotations

from pathlib import Path

from app.ingress.generation import Usage as Tokens
from app.usage.records import UsageRecord
from app.usage.report import read_usage, rows
from app.usage.segment import SegmentFile
from app.usage.settings import UsageSettings
from app.usage.totals import UsageCounts
from app.usage.writer import OpenRequest, UsageStats, UsageWriter

# 2026-11-23, 00:00 UTC.
MIDNIGHT = 1795392000.0


class Clock:
    """Tells the time that a test sets, in Unix seconds."""

    def __init__(self, now: float = MIDNIGHT) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class World:
    """A writer on a directory, its clock, and what a reader sees."""

    def __init__(self, directory: Path, writer: str = "w", **settings: float) -> None:
        self.clock = Clock()
        self.settings = UsageSettings(directory, **settings)  # type: ignore[arg-type]
        self.stats = UsageStats()
        self.writer = UsageWriter(self.settings, writer, self.stats, self.clock)

    def begin(self, name: str, tenant: str = "acme", prompt_tokens: int = 10) -> OpenRequest:
        request = OpenRequest(name, tenant, "tiny", "", Tokens(prompt_tokens))
        request.began = self.clock.now
        self.writer.take([request])
        return request

    def end(self, request: OpenRequest, output_tokens: int = 5) -> None:
        request.tokens.completion_tokens = output_tokens
        request.status, request.finish, request.ended = 200, "stop", self.clock.now
        self.writer.take([request])

    def crash(self) -> None:
        """As if the process had been killed: its lock is gone, nothing else happens."""
        assert self.writer._segment is not None
        self.writer._segment.abandon()

    def counts(self, by: str = "tenant") -> dict[str, UsageCounts]:
        return counts(self.settings.directory, by)


def counts(where: Path | str, by: str = "tenant") -> dict[str, UsageCounts]:
    return {group[0]: found for group, found in rows(read_usage(str(where)), [by])}


def record(request_id: str = "cmpl-1", at: float = MIDNIGHT, **fields: object) -> UsageRecord:
    made = UsageRecord("end", request_id, at, "acme", "tiny", "", 10, 4, 5, 200, "stop")
    return made._replace(**fields)  # type: ignore[arg-type]


def segment(folder: Path, name: str, lines: bytes = b"") -> SegmentFile:
    file = SegmentFile(folder, name, MIDNIGHT)
    file.append(lines)
    return file
