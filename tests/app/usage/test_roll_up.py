from __future__ import annotations

import fcntl
import itertools
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from app.usage import roll_up as module
from app.usage.records import encode_line
from app.usage.roll_up import DAYS, KEPT, OTHERS, roll_up
from app.usage.segment import try_lock
from app.usage.settings import UsageSettings
from app.usage.totals import UsageCounts
from app.usage.writer import SEGMENTS, UsageStats
from tests.app.usage.helpers import MIDNIGHT, World, counts, record, segment


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure leaves is nothing that a test can see."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _: None)


def fill(directory: Path) -> None:
    """Three writers: one that rolls and is killed, one that ends well around midnight, one that was torn off."""
    world = World(directory, roll_bytes=900)
    long = world.begin("long")
    for number in range(6):
        world.end(world.begin(f"cmpl-{number}"))
        long.tokens.completion_tokens += 1
        world.writer.write()
    world.crash()
    lines = [record("early", MIDNIGHT - 1, tenant="bert"), record("late", MIDNIGHT + 1, tenant="bert")]
    segment(directory / SEGMENTS, "x-000001", b"".join(map(encode_line, lines))).close(carried=False)
    torn = segment(directory / SEGMENTS, "y-000001", encode_line(record("whole", tenant="carl")))
    torn.abandon()
    with torn.path.open("ab") as file:
        file.write(encode_line(record("torn", tenant="carl"))[:-20])


EXPECTED = {
    "acme": UsageCounts(7, 0, 1, 70, 0, 35),
    "bert": UsageCounts(2, 0, 0, 20, 8, 10),
    "carl": UsageCounts(1, 0, 0, 10, 4, 5),
}


def check(directory: Path) -> None:
    found = counts(directory)
    # The last note of the long request depends on where the segments were cut.
    assert 30 < found["acme"].output_tokens <= 36
    found["acme"].output_tokens = 35
    assert found == EXPECTED
    assert counts(directory, "day").keys() == {"2026-11-22", "2026-11-23"}


def test_totals_are_equal_before_and_after(tmp_path: Path) -> None:
    fill(tmp_path)
    check(tmp_path)
    stats = UsageStats()
    for _ in range(2):
        roll_up(UsageSettings(tmp_path), stats)
        check(tmp_path)
    assert list((tmp_path / SEGMENTS).iterdir()) == []
    assert len(list((tmp_path / KEPT).iterdir())) > 3
    day = json.loads((tmp_path / DAYS / "2026-11-23.json").read_text())
    assert sum(day["segments"].values()) == 1, "the torn line"
    assert not any(stats.errors.values())


class CrashError(BaseException):
    """The process is killed here."""


def test_a_crash_at_any_moment_changes_no_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes what is on the disk is, in turn, the last one."""

    def run_until(directory: Path, moment: int) -> bool:
        calls = itertools.count()

        def crashing(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == moment:
                    raise CrashError
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (os, "fsync"), (Path, "unlink")):
                patch.setattr(owner, name, crashing(getattr(owner, name)))
            try:
                roll_up(UsageSettings(directory), UsageStats())
            except CrashError:
                return True
            return False

    for moment in itertools.count():
        directory = tmp_path / str(moment)
        fill(directory)
        crashed = run_until(directory, moment)
        check(directory)
        stats = UsageStats()
        roll_up(UsageSettings(directory), stats)
        check(directory)
        assert not any(stats.errors.values())
        assert list((directory / SEGMENTS).iterdir()) == []
        if not crashed:
            break
    assert moment > 20


def test_a_segment_in_use_is_left_alone(tmp_path: Path) -> None:
    world = World(tmp_path, roll_bytes=600)
    for number in range(5):
        world.end(world.begin(f"cmpl-{number}"))
        world.writer.write()
    roll_up(world.settings, world.stats)
    assert world.counts()["acme"].requests == 5
    (live,) = (tmp_path / SEGMENTS).iterdir()
    world.end(world.begin("last"))
    assert world.writer.write()
    assert world.stats.errors["lost"] == 0
    assert live.exists()
    assert world.counts()["acme"].requests == 6


def test_a_request_that_goes_on_after_its_segment_is_added_counts_once(tmp_path: Path) -> None:
    world = World(tmp_path, roll_bytes=300)
    long = world.begin("long")
    world.writer.write()
    roll_up(world.settings, world.stats)
    assert world.counts() == {}
    world.crash()
    assert world.counts()["acme"].interrupted == 1
    assert long.noted == 0
    roll_up(world.settings, world.stats)
    assert world.counts()["acme"] == UsageCounts(requests=1, unserved=1, interrupted=1)


def test_what_another_process_adds_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    asked: list[bool] = []

    def again(*_: Any) -> None:
        if not asked:
            asked.append(True)
            before = sorted((tmp_path / SEGMENTS).iterdir())
            roll_up(UsageSettings(tmp_path), UsageStats())
            assert sorted((tmp_path / SEGMENTS).iterdir()) == before

    monkeypatch.setattr(module, "_remove_unfinished", again)
    roll_up(UsageSettings(tmp_path), UsageStats())
    assert asked
    check(tmp_path)


def test_one_that_has_patience_waits_for_another(tmp_path: Path) -> None:
    fill(tmp_path)
    lock = os.open(tmp_path / "roll_up.lock", os.O_RDWR | os.O_CREAT)
    assert try_lock(lock, fcntl.LOCK_EX)
    threading.Timer(0.1, os.close, (lock,)).start()
    roll_up(UsageSettings(tmp_path), UsageStats(), patience_s=60.0)
    assert list((tmp_path / SEGMENTS).iterdir()) == []
    check(tmp_path)


def test_unfinished_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    fill(tmp_path)
    making = tmp_path / SEGMENTS / "z-000001.making"
    making.write_bytes(b"torn")
    roll_up(UsageSettings(tmp_path), UsageStats())
    assert not making.exists()
    check(tmp_path)


def test_tenants_of_a_day_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 3)
    lines = b"".join(encode_line(record(str(number), tenant=f"t{number}")) for number in range(10))
    segment(tmp_path / SEGMENTS, "w-000001", lines).close(carried=False)
    roll_up(UsageSettings(tmp_path), UsageStats())
    found = counts(tmp_path)
    assert sorted(found) == [OTHERS, "t0", "t1", "t2"]
    assert found[OTHERS].requests == 7


def test_segments_are_kept_for_as_long_as_is_asked(tmp_path: Path) -> None:
    fill(tmp_path)
    roll_up(UsageSettings(tmp_path, keep_days=1.0), UsageStats())
    files = sorted((tmp_path / KEPT).iterdir())
    os.utime(files[0], (0, 0))
    roll_up(UsageSettings(tmp_path, keep_days=1.0), UsageStats())
    assert sorted((tmp_path / KEPT).iterdir()) == files[1:]
    check(tmp_path)


def test_a_failure_is_counted_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path)
    (tmp_path / DAYS).write_text("in the way")
    stats = UsageStats()
    for _ in range(2):
        roll_up(UsageSettings(tmp_path), stats)
    assert stats.errors["roll_up"] == 2
    assert caplog.text.count("cannot be rolled up") == 1
    (tmp_path / DAYS).unlink()
    roll_up(UsageSettings(tmp_path), stats)
    check(tmp_path)
