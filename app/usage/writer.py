"""Writes the ledger's records: segments, what waits for a disk that fails, and requests that are still open.

All of it is called by one thread, which may wait for the disk. What is written survives this process' end; what is
synced, the machine's.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from app.usage.records import RecordKind, UsageRecord, encode_line
from app.usage.segment import SegmentFile, segment_name
from app.usage.settings import UsageSettings

logger = logging.getLogger(__name__)

SEGMENTS = "segments"
# Records that may wait for a disk that fails, each of some 300 bytes.
MAX_PENDING = 65_536

Operation = Literal["write", "sync", "roll", "lost", "roll_up", "copy"]
OPERATIONS: tuple[Operation, ...] = ("write", "sync", "roll", "lost", "roll_up", "copy")


class TokenCounts(Protocol):
    """Tokens of one request so far; whoever counts them goes on while they are read."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class OpenRequest:
    """A request from its beginning to its end.

    Attributes:
        is_queued: the writer will hear of it, or has.
        ended: Unix seconds; 0.0 while it runs. Set last, as the writer's thread may look at any time.
        is_closed: the writer has taken its end.
        noted: output tokens of its last record.
    """

    __slots__ = (
        "adapter",
        "began",
        "ended",
        "finish",
        "is_closed",
        "is_queued",
        "model",
        "noted",
        "request_id",
        "status",
        "tenant",
        "tokens",
    )

    def __init__(self, request_id: str, tenant: str, model: str, adapter: str, tokens: TokenCounts) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.model = model
        self.adapter = adapter
        self.tokens = tokens
        self.began = time.time()
        self.ended = 0.0
        self.status = 0
        self.finish = ""
        self.is_queued = self.is_closed = False
        self.noted = 0

    def record(self, kind: RecordKind, at: float) -> UsageRecord:
        """What is known of it now."""
        tokens = self.tokens
        return UsageRecord(
            kind,
            self.request_id,
            at,
            self.tenant,
            self.model,
            self.adapter,
            tokens.prompt_tokens,
            tokens.cached_tokens,
            tokens.completion_tokens,
            self.status,
            self.finish,
        )


@dataclass(slots=True)
class UsageStats:
    """What became of records since the process began.

    Attributes:
        written: records that are in a segment.
        dropped: requests of which nothing could be kept, as too many records waited for the disk.
        errors: by what failed.
    """

    written: int = 0
    dropped: int = 0
    errors: dict[Operation, int] = field(default_factory=lambda: dict.fromkeys(OPERATIONS, 0))
    _failing: set[Operation] = field(default_factory=set)

    def failed(self, operation: Operation, what: str, error: Exception) -> None:
        """Count a failure; said once until it has gone well again."""
        self.errors[operation] += 1
        if operation not in self._failing:
            self._failing.add(operation)
            logger.error("usage ledger: %s: %s; said once, counted in quire_usage_errors_total", what, error)

    def went_well(self, operation: Operation) -> None:
        """What had failed goes again."""
        if operation in self._failing:
            self._failing.discard(operation)
            logger.warning("usage ledger: %s goes well again", operation)


class UsageWriter:
    """Writes one process' records.

    Args:
        writer: its name, which no other process has.
        clock: Unix seconds.
    """

    def __init__(
        self, settings: UsageSettings, writer: str, stats: UsageStats, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._folder = settings.directory / SEGMENTS
        self._writer = writer
        self._clock = clock
        self._stats = stats
        self._pending: list[bytes] = []
        self._number = 1
        self._noted_at = clock()
        self._is_synced = True
        self.open: dict[str, OpenRequest] = {}
        self._segment: SegmentFile | None = None
        # A fault is counted, said and tried again: an ingress that comes back must serve, whatever its disk does.
        self.write()

    @property
    def has_room(self) -> bool:
        """Whether more records may be taken."""
        return len(self._pending) < MAX_PENDING

    @property
    def is_settled(self) -> bool:
        """Whether all records that were taken are on the disk."""
        return not self._pending and self._is_synced

    @property
    def has_old_segment(self) -> bool:
        """Whether a segment with records is still open, which is to be closed when it is old enough."""
        return self._segment is not None and not self._segment.is_empty

    def take(self, requests: Iterable[OpenRequest]) -> None:
        """Requests that have begun or ended, in that order."""
        for request in requests:
            if request.is_closed:
                continue
            if request.ended:
                self._take_end(request)
            else:
                # It may have begun to run already; what counts is noted from now on.
                self.open[request.request_id] = request
                self._note(request, "begin", request.began)

    def note_progress(self) -> None:
        """Note the tokens of requests that run: their first ones, and from then on every `progress_s`."""
        now = self._clock()
        is_due = now - self._noted_at >= self._settings.progress_s
        if is_due:
            self._noted_at = now
        for request in list(self.open.values()):
            if not self.has_room:
                return
            if request.ended:
                # The queue had no room for its end.
                self._take_end(request)
            elif request.tokens.completion_tokens != request.noted and (is_due or request.noted == 0):
                self._note(request, "progress", now)

    def write(self) -> bool:
        """Write what waits; a segment that is full, old or gone is followed by another. False if it must wait on."""
        try:
            segment = self._present_segment()
            if self._pending:
                segment.append(b"".join(self._pending))
                self._is_synced = False
        except OSError as error:
            self._stats.failed("write", f"{self._folder} cannot be written", error)
            return False
        self._stats.went_well("write")
        self._stats.written += len(self._pending)
        self._pending.clear()
        # Only now: an end that waits belongs into the segment that has the request's beginning, or into the next one
        # together with it.
        self._roll_if_due(segment)
        return True

    def sync(self) -> bool:
        """Have what was written survive the machine; False if it does not."""
        if self._segment is None:
            return False
        try:
            if not self._is_synced:
                self._segment.sync()
        except OSError as error:
            self._stats.failed("sync", f"{self._segment.path} cannot be synced", error)
            return False
        self._stats.went_well("sync")
        self._is_synced = True
        return True

    def close(self) -> None:
        """Write what waits and close the segment; requests that are still open count as interrupted."""
        self.note_progress()
        self.write()
        if self._segment is not None:
            try:
                self._segment.close(carried=False)
            except OSError as error:
                self._stats.failed("write", f"{self._segment.path} cannot be closed", error)
            self._segment = None
        if self._pending:
            logger.error("usage ledger: %d records could not be written and are lost", len(self._pending))

    def _take_end(self, request: OpenRequest) -> None:
        request.is_closed = True
        self.open.pop(request.request_id, None)
        self._pending.append(encode_line(request.record("end", request.ended)))

    def _note(self, request: OpenRequest, kind: RecordKind, at: float) -> None:
        record = request.record(kind, at)
        request.noted = record.output_tokens
        self._pending.append(encode_line(record))

    def _present_segment(self) -> SegmentFile:
        if self._segment is not None and self._segment.is_lost():
            error = FileNotFoundError("somebody has removed it")
            self._stats.failed("lost", f"{self._segment.path} is gone, with what it had", error)
            self._segment.abandon()
            self._segment = None
            self._number += 1
        if self._segment is None:
            self._segment = self._new_segment(self._number)
            self._stats.went_well("lost")
        return self._segment

    def _roll_if_due(self, old: SegmentFile) -> None:
        age = self._clock() - old.began
        if old.size < self._settings.roll_bytes and (age < self._settings.roll_s or old.is_empty):
            return
        try:
            # All that it has is to survive before the next one says that its requests go on there.
            old.sync()
            self._segment = self._new_segment(self._number + 1)
        except OSError as error:
            self._stats.failed("roll", "a further segment cannot be made", error)
            return
        self._stats.went_well("roll")
        self._number += 1
        self._is_synced = True
        # The next one is there: that alone says that the requests go on, should this fail.
        with contextlib.suppress(OSError):
            old.close(carried=True)

    def _new_segment(self, number: int) -> SegmentFile:
        now = self._clock()
        waiting = [encode_line(request.record("progress", now)) for request in self.open.values()]
        return SegmentFile(self._folder, segment_name(self._writer, number), now, waiting)
