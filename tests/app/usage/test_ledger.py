"""The ledger with its threads, in this process and in others that are killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.ingress.generation import Usage as Tokens
from app.usage import UsageLedger, UsageSettings, ledger
from app.usage.report import read_usage
from app.usage.roll_up import roll_up
from app.usage.totals import UsageCounts
from app.usage.writer import UsageStats, UsageWriter
from tests.app.usage.helpers import counts

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 60.0


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[UsageLedger]:
    made = UsageLedger(UsageSettings(tmp_path), "replica-1")
    yield made
    made.close()


def serve(kept: UsageLedger, name: str, tenant: str = "acme", output_tokens: int = 5) -> None:
    request = kept.begin(name, tenant, "tiny", "", Tokens(10, output_tokens, 4))
    kept.end(request, 200, "stop")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_it_is_told_is_on_the_disk_soon(kept: UsageLedger, tmp_path: Path) -> None:
    for number in range(100):
        serve(kept, f"cmpl-{number}", "acme" if number % 2 else "bert")
    assert kept.flush(TIMEOUT_S)
    expected = UsageCounts(50, 0, 0, 500, 200, 250)
    assert counts(tmp_path) == {"acme": expected, "bert": expected}
    serve(kept, "alone")
    until(lambda: counts(tmp_path)["acme"].requests == 51)


def test_it_is_added_to_the_days_totals_at_the_end(tmp_path: Path) -> None:
    kept = UsageLedger(UsageSettings(tmp_path), "replica-1")
    serve(kept, "cmpl-1")
    running = kept.begin("cmpl-2", "acme", "tiny", "", Tokens(10, 3))
    assert kept.flush(TIMEOUT_S)
    assert read_usage(str(tmp_path)).num_open == 1
    kept.close()
    assert not running.ended
    assert counts(tmp_path) == {"acme": UsageCounts(2, 0, 1, 20, 4, 8)}
    assert list((tmp_path / "segments").iterdir()) == []


def test_a_directory_that_cannot_be_written_is_said_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "usage").write_text("in the way")
    ledger = UsageLedger(UsageSettings(tmp_path / "usage"), "replica-1")
    assert ledger.stats.errors["write"] == 1
    assert "usage/segments cannot be written" in caplog.text
    serve(ledger, "cmpl-1")
    (tmp_path / "usage").unlink()
    assert ledger.flush(TIMEOUT_S)
    ledger.close()
    assert counts(tmp_path / "usage") == {"acme": UsageCounts(1, 0, 0, 10, 4, 5)}


def test_a_queue_that_is_full_drops_what_it_must_and_counts_it(
    kept: UsageLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The writer hangs in a write, as it would on a dead file server.
    goes_on = threading.Event()
    append = UsageWriter.write

    def hangs(self: Any) -> bool:
        goes_on.wait(TIMEOUT_S)
        return append(self)

    monkeypatch.setattr(UsageWriter, "write", hangs)
    known = kept.begin("known", "acme", "tiny", "", Tokens(10, 5))
    until(lambda: not kept._queue)
    monkeypatch.setattr(ledger, "MAX_PENDING", 3)
    for number in range(5):
        serve(kept, f"cmpl-{number}")
    assert len(kept._queue) == 3
    # Of cmpl-1 the end had no room, yet the writer knows of its beginning.
    assert kept.stats.dropped == 3
    kept.end(known, 200, "stop")
    assert kept.stats.dropped == 3
    goes_on.set()
    assert kept.flush(TIMEOUT_S)
    until(lambda: counts(tmp_path)["acme"].requests == 3)
    until(lambda: read_usage(str(tmp_path)).num_open == 0)


def test_a_disk_that_fails_for_a_while_costs_no_record(
    kept: UsageLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_RETRY_S", 0.01)
    write = os.write
    failing = True

    def full(descriptor: int, data: Any) -> int:
        if failing and threading.current_thread().name == "usage-writer":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    serve(kept, "cmpl-1")
    until(lambda: kept.stats.errors["write"] > 2)
    serve(kept, "cmpl-2")
    failing = False
    assert kept.flush(TIMEOUT_S)
    assert counts(tmp_path)["acme"].requests == 2


# Serves request after request and says of each ten that they are on the disk, until it is killed.
WRITER = """
import sys
from pathlib import Path
from app.ingress.generation import Usage as Tokens
from app.usage import UsageLedger, UsageSettings

kept = UsageLedger(UsageSettings(Path(sys.argv[1]), roll_bytes=4000, progress_s=0.0, sync_s=0.05), "same-name")
running = kept.begin(sys.argv[2] + "-long", "long", "tiny", "", Tokens(100, 1))
number = 0
while True:
    for _ in range(10):
        request = kept.begin(f"{sys.argv[2]}-{number}", sys.argv[2], "tiny", "", Tokens(7, 3, 2))
        kept.end(request, 200, "stop")
        number += 1
        running.tokens.completion_tokens += 1
    if kept.flush(60):
        print(number, running.tokens.completion_tokens, flush=True)
"""


def test_nothing_acknowledged_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    """Two processes on one directory, both killed amid their writes, while a third adds what they close."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), name], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for name in ("left", "right")
    ]
    acknowledged: list[tuple[int, int]] = []
    try:
        stats = UsageStats()
        for process in writers:
            assert process.stdout is not None
            for _ in range(30):
                assert process.stdout.readline()
            roll_up(UsageSettings(tmp_path), stats)
        time.sleep(random.uniform(0.0, 0.05))
    finally:
        for process in writers:
            process.send_signal(signal.SIGKILL)
    for process in writers:
        lines = process.communicate()[0].splitlines(keepends=True)
        whole = [line.split() for line in lines if line.endswith("\n")]
        acknowledged.append((int(whole[-1][0]), int(whole[-1][1])) if whole else (300, 301))
    before = counts(tmp_path)
    for _ in range(2):
        for name, (number, _tokens) in zip(("left", "right"), acknowledged, strict=True):
            told = before[name]
            assert number <= told.requests
            # Every request is in it whole, those that were killed with it apart.
            assert told.requests - told.interrupted >= number
            served = told.requests - told.unserved
            assert (told.prompt_tokens, told.cached_tokens, told.output_tokens) == (7 * served, 2 * served, 3 * served)
        assert (before["long"].requests, before["long"].interrupted) == (2, 2)
        assert before["long"].prompt_tokens == 200
        assert before["long"].output_tokens >= sum(tokens for _, tokens in acknowledged)
        roll_up(UsageSettings(tmp_path), stats)
        assert counts(tmp_path) == before
    assert not any(stats.errors.values())
    assert list((tmp_path / "segments").iterdir()) == []
    assert len(list((tmp_path / "kept").iterdir())) > 4
