from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.usage.records import SegmentEnd, SegmentStart, encode_line
from app.usage.segment import SegmentFile, close_abandoned, decode_lines, is_being_written, next_segment
from tests.app.usage.helpers import MIDNIGHT, record, segment

LINE = encode_line(record())


def lines(path: Path) -> list[object]:
    with path.open("rb") as file:
        return list(decode_lines(file))


def test_names_follow_one_another() -> None:
    assert next_segment("20261123T000000-replica-1-000009") == "20261123T000000-replica-1-000010"
    with pytest.raises(ValueError, match="no segment's name"):
        next_segment("segment")


def test_a_segment_has_its_first_lines_when_it_appears(tmp_path: Path) -> None:
    file = SegmentFile(tmp_path, "w-000001", MIDNIGHT, [LINE, LINE])
    assert lines(file.path) == [SegmentStart(MIDNIGHT), record(), record()]
    assert list(tmp_path.iterdir()) == [file.path]
    file.close(carried=False)
    assert lines(file.path)[-1] == SegmentEnd(carried=False)


def test_two_never_share_a_segment(tmp_path: Path) -> None:
    first = segment(tmp_path, "w-000001", LINE)
    with pytest.raises(FileExistsError, match="another process"):
        segment(tmp_path, "w-000001")
    assert is_being_written(first.path)
    assert not close_abandoned(first.path, lambda: False)
    assert lines(first.path) == [SegmentStart(MIDNIGHT), record()]
    first.abandon()
    assert not is_being_written(first.path)
    assert close_abandoned(first.path, lambda: True)
    assert close_abandoned(first.path, lambda: False), "closed once, as it was the first time"
    assert lines(first.path) == [SegmentStart(MIDNIGHT), record(), SegmentEnd(carried=True)]


def test_a_torn_last_line_is_told_apart_when_it_is_closed(tmp_path: Path) -> None:
    file = segment(tmp_path, "w-000001", LINE)
    file.abandon()
    with file.path.open("ab") as torn:
        torn.write(LINE[:40])
    assert close_abandoned(file.path, lambda: False)
    assert lines(file.path) == [SegmentStart(MIDNIGHT), record(), None, SegmentEnd(carried=False)]


def test_one_without_records_leaves_nothing(tmp_path: Path) -> None:
    segment(tmp_path, "w-000001").close(carried=False)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = segment(tmp_path, "w-000001", LINE)
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:-10])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.append(LINE + LINE)
    monkeypatch.undo()
    file.append(LINE)
    assert lines(file.path) == [SegmentStart(MIDNIGHT), record(), record()]


def test_what_could_not_be_taken_back_is_taken_back_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = segment(tmp_path, "w-000001", LINE)
    write = os.write

    def breaks(descriptor: int, data: Any) -> int:
        write(descriptor, data[:30])
        raise OSError(errno.EIO, "Input/output error")

    def refused(_: int, __: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", breaks)
    monkeypatch.setattr(os, "ftruncate", refused)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            file.append(LINE)
    monkeypatch.undo()
    file.append(LINE)
    assert lines(file.path) == [SegmentStart(MIDNIGHT), record(), record()]


def test_one_that_was_removed_is_known_to_be_lost(tmp_path: Path) -> None:
    file = segment(tmp_path / "here", "w-000001", LINE)
    assert not file.is_lost()
    shutil.rmtree(tmp_path / "here")
    assert file.is_lost()
    other = segment(tmp_path / "here", "w-000001")
    assert file.is_lost(), "another file of that name is not this one"
    other.close(carried=False)
    file.abandon()


@pytest.mark.parametrize("name", ["fdatasync", "fsync"])
def test_one_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match="Input/output"):
        segment(tmp_path, "w-000001")
    assert list(tmp_path.iterdir()) == []
