from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from app.usage import segment, writer
from app.usage.totals import UsageCounts
from app.usage.writer import SEGMENTS
from tests.app.usage.helpers import World, counts


def segments(world: World) -> list[str]:
    return sorted(path.name for path in (world.settings.directory / SEGMENTS).iterdir())


def test_a_request_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    request = world.begin("cmpl-1")
    assert world.writer.write()
    assert counts(tmp_path) == {}, "it runs"
    world.end(request)
    assert world.writer.write()
    assert world.writer.sync()
    assert world.writer.is_settled
    assert world.counts() == {"acme": UsageCounts(1, 0, 0, 10, 0, 5)}
    assert world.stats.written == 2


def test_a_process_that_ends_loses_what_came_since_the_last_note(tmp_path: Path) -> None:
    world = World(tmp_path, progress_s=10.0)
    request = world.begin("cmpl-1")
    waiting = world.begin("cmpl-2")
    for at, tokens in ((1, 3), (2, 4), (11, 30), (2, 31)):
        world.clock.now += at
        request.tokens.completion_tokens = tokens
        world.writer.note_progress()
        world.writer.write()
    assert waiting.noted == 0
    world.crash()
    # The first token is noted at once, so that the prompt counts; then every ten seconds.
    assert world.stats.written == 4
    assert world.counts() == {"acme": UsageCounts(2, 1, 2, 10, 0, 30)}


def test_requests_go_on_in_the_next_segment(tmp_path: Path) -> None:
    world = World(tmp_path, roll_bytes=1500)
    long = world.begin("long")
    long.tokens.completion_tokens = 2
    for number in range(20):
        world.end(world.begin(f"cmpl-{number}"))
        world.writer.write()
    assert len(segments(world)) > 3
    assert world.counts()["acme"].requests == 20
    world.end(long, 7)
    world.writer.write()
    world.writer.close()
    assert world.counts() == {"acme": UsageCounts(21, 0, 0, 210, 0, 107)}


def test_a_segment_is_closed_when_it_is_old(tmp_path: Path) -> None:
    world = World(tmp_path, roll_s=60.0)
    world.clock.now += 61
    world.writer.write()
    assert segments(world) == ["w-000001.jsonl"], "one without records stays"
    request = world.begin("cmpl-1")
    world.writer.write()
    assert segments(world) == ["w-000001.jsonl", "w-000002.jsonl"]
    world.crash()
    assert world.counts()["acme"].interrupted == 1, "once, though two segments have it"
    assert request.request_id in world.writer.open


def test_a_full_disk_costs_nothing_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    world = World(tmp_path)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if descriptor > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    for number in range(3):
        world.end(world.begin(f"cmpl-{number}"))
        assert not world.writer.write()
    monkeypatch.undo()
    assert world.stats.errors["write"] == 3
    assert [line.levelname for line in caplog.records] == ["ERROR"], "said once"
    assert "No space left on device" in caplog.text
    assert world.writer.write()
    assert "write goes well again" in caplog.text
    assert world.counts()["acme"].requests == 3


def test_what_waits_for_a_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_PENDING", 4)
    world = World(tmp_path)
    world.end(world.begin("cmpl-1"))
    assert world.writer.has_room
    world.end(world.begin("cmpl-2"))
    assert not world.writer.has_room
    world.writer.write()
    assert world.writer.has_room


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path / "usage")
    running, done = world.begin("running"), world.begin("done")
    world.writer.write()
    shutil.rmtree(tmp_path / "usage")
    world.end(done)
    assert world.writer.write()
    assert world.stats.errors["lost"] == 1
    assert "w-000001.jsonl is gone, with what it had" in caplog.text
    world.end(running)
    assert world.writer.write()
    assert segments(world) == ["w-000002.jsonl"]
    assert world.counts()["acme"].requests == 2, "both were known, and have ended since"


def test_a_directory_that_cannot_be_made_again_keeps_records_waiting(tmp_path: Path) -> None:
    world = World(tmp_path / "usage")
    world.end(world.begin("cmpl-1"))
    shutil.rmtree(tmp_path / "usage")
    (tmp_path / "usage").write_text("in the way")
    for _ in range(3):
        assert not world.writer.write()
        assert not world.writer.sync()
    assert world.stats.errors["lost"] == 1
    (tmp_path / "usage").unlink()
    assert world.writer.write()
    assert world.counts()["acme"].requests == 1


def test_a_segment_that_cannot_follow_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, roll_bytes=100)

    def fails(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(segment, "sync_folder", fails)
    long = world.begin("long")
    assert world.writer.write()
    world.end(world.begin("cmpl-1"))
    assert world.writer.write()
    assert world.stats.errors["roll"] == 2
    assert segments(world) == ["w-000001.jsonl"]
    monkeypatch.undo()
    world.end(long)
    assert world.writer.write()
    assert segments(world) == ["w-000001.jsonl", "w-000002.jsonl"]
    assert world.counts()["acme"].requests == 2


def test_requests_that_are_open_at_the_end_are_interrupted(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.begin("cmpl-1").tokens.completion_tokens = 3
    world.writer.close()
    assert world.counts() == {"acme": UsageCounts(1, 0, 1, 10, 0, 3)}
