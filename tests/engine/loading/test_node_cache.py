"""Files made once for all processes of a node."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from engine.loading.node_cache import cache_folder, make_once

ROOT = Path(__file__).parents[3]


def test_the_folder_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "quire"
    for unset in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / ".cache" / "quire"


def test_one_of_many_writes_and_all_get_the_whole_file(tmp_path: Path) -> None:
    calls = []

    def write(file: BinaryIO) -> None:
        calls.append(file.name)
        for _ in range(100):
            file.write(b"x" * 1000)

    path = tmp_path / "deep" / "file"
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: make_once(path, write), range(8)))
    assert paths == [path] * 8
    assert path.stat().st_size == 100_000
    assert len(calls) == 1


def test_a_failure_leaves_nothing_and_the_next_one_writes(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    path = tmp_path / "file"
    with pytest.raises(OSError, match="disk full"):
        make_once(path, fail)
    assert {other.name for other in tmp_path.iterdir()} == {"file.lock"}
    assert make_once(path, lambda file: file.write(b"whole")).read_bytes() == b"whole"


def test_a_killed_writer_leaves_no_file_and_holds_nobody_up(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from engine.loading.node_cache import make_once
make_once(Path(sys.argv[1]), lambda file: (file.write(b"half"), file.flush(), os.kill(os.getpid(), signal.SIGKILL)))
"""
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert not path.exists()
    assert make_once(path, lambda file: file.write(b"whole")).read_bytes() == b"whole"
    assert {other.name for other in tmp_path.iterdir()} == {"file", "file.lock"}
