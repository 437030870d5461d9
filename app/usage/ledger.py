"""The usage ledger of one process: told of requests on its event loop, which never waits for it.

A request costs the loop two appends to a queue; a thread takes the queue from there, gathering for a few milliseconds
what comes together. A process that is killed loses what it was told in that time; the machine, what is not synced yet
(`sync_s`). Of requests that then still run, the tokens since their last note are lost (`progress_s`).
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from typing import NamedTuple

from app.usage.roll_up import roll_up
from app.usage.settings import UsageSettings
from app.usage.writer import MAX_PENDING, OpenRequest, TokenCounts, UsageStats, UsageWriter

# What comes within this time is written together.
_GATHER_S = 0.02
_RETRY_S = 1.0
_ROLL_UP_PERIOD_S = 30.0
_CLOSE_TIMEOUT_S = 10.0
# A roll-up is Python's work as serving is: it works for some hundred microseconds, then it rests for so long.
_ROLL_UP_REST_S = 0.01


class _Flush(NamedTuple):
    """Comes behind what is to be on the disk."""

    done: threading.Event


class UsageLedger:
    """Keeps what requests use. Its methods are called on one thread, or on the loop.

    Args:
        name: of this process among the application's, for its files.
    """

    def __init__(self, settings: UsageSettings, name: str) -> None:
        self._settings = settings
        self.stats = UsageStats()
        safe = re.sub(r"[^A-Za-z0-9._]", "-", name)
        writer = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{safe}-{os.getpid()}"
        self._writer = UsageWriter(settings, writer, self.stats)
        self._queue: deque[OpenRequest | _Flush] = deque()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._write_until_stopped, name="usage-writer", daemon=True),
            threading.Thread(target=self._roll_up_until_stopped, name="usage-roll-up", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, request_id: str, tenant: str, model: str, adapter: str, tokens: TokenCounts) -> OpenRequest:
        """A request is sound and goes to a model; `tokens` is read until it ends."""
        request = OpenRequest(request_id, tenant, model, adapter, tokens)
        self._put(request)
        return request

    def end(self, request: OpenRequest, status: int, finish: str) -> None:
        """Its answer has ended: HTTP status, and why its choices did."""
        request.status, request.finish = status, finish
        request.ended = time.time()
        self._put(request)
        if not request.is_queued:
            self.stats.dropped += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that it was told before is on the disk; False if that takes longer. Not for an event loop."""
        done = threading.Event()
        self._queue.append(_Flush(done))
        self._wake.set()
        return done.wait(timeout_s)

    def close(self) -> None:
        """Write what waits, close the segment and add it to the days' totals; for ten seconds at most."""
        self._stopping.set()
        self._wake.set()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _put(self, request: OpenRequest) -> None:
        if len(self._queue) >= MAX_PENDING:
            # If the writer has heard of it, it will see its end all the same.
            return
        request.is_queued = True
        self._queue.append(request)
        if not self._wake.is_set():
            self._wake.set()

    def _write_until_stopped(self) -> None:
        writer = self._writer
        flushes: list[_Flush] = []
        ticked_at = time.monotonic()
        while not self._stopping.is_set():
            self._wake.wait(self._rest_s(bool(flushes)))
            # A flush waits for somebody; anything else may wait for more.
            self._stopping.wait(_GATHER_S if not flushes else 0.0)
            self._wake.clear()
            flushes += self._take()
            went_well = writer.write()
            now = time.monotonic()
            if flushes or now - ticked_at >= self._settings.sync_s:
                ticked_at = now
                writer.note_progress()
                went_well = writer.write() and writer.sync()
            if went_well and writer.is_settled:
                for flush in flushes:
                    flush.done.set()
                flushes.clear()
            elif not went_well:
                self._stopping.wait(_RETRY_S)
        flushes += self._take()
        writer.close()

    def _rest_s(self, in_haste: bool) -> float | None:
        """How long the writer may sleep if nothing comes; None for ever."""
        writer = self._writer
        if in_haste:
            return 0.0
        if not writer.is_settled or writer.open:
            return self._settings.sync_s
        return self._settings.roll_s if writer.has_old_segment else None

    def _take(self) -> list[_Flush]:
        """Give the writer what is in the queue, as far as it has room."""
        flushes, queue = [], self._queue
        taken: list[OpenRequest] = []
        while queue and (self._writer.has_room or self._stopping.is_set()):
            item = queue.popleft()
            if isinstance(item, _Flush):
                flushes.append(item)
            else:
                taken.append(item)
            if len(taken) >= 1024:
                self._writer.take(taken)
                taken = []
        self._writer.take(taken)
        return flushes

    def _roll_up_until_stopped(self) -> None:
        while not self._stopping.wait(_ROLL_UP_PERIOD_S):
            roll_up(self._settings, self.stats, pace=lambda: time.sleep(_ROLL_UP_REST_S))
        self._threads[0].join(_CLOSE_TIMEOUT_S)
        # Ingresses of an application end together, and each has a segment to add.
        roll_up(self._settings, self.stats, patience_s=_CLOSE_TIMEOUT_S / 2)
