"""Files made once for all processes of a node."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from engine.errors import ConfigError
from engine.loading.node_cache import CacheFullError, cache_folder, cache_limit, make_once, open_cached, reserve

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
    assert [each.path for each in paths] == [path] * 8
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
    assert make_once(path, lambda file: file.write(b"whole")).path.read_bytes() == b"whole"


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
    assert make_once(path, lambda file: file.write(b"whole")).path.read_bytes() == b"whole"
    assert {other.name for other in tmp_path.iterdir()} == {"file", "file.lock"}


def make(path: Path, size: int) -> None:
    def write(file: BinaryIO) -> None:
        reserve(file.fileno(), [range(size)])
        file.write(bytes(size))

    make_once(path, write).close()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache that may take 1 MiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QUIRE_CACHE_BYTES", "1M")
    return cache_folder() / "packed"


def present(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_the_bound_holds_and_the_longest_unused_goes_first(folder: Path) -> None:
    for name in "abc":
        make(folder / name, 300_000)
    open_cached(folder / "a").close()
    make(folder / "d", 300_000)
    assert present(folder) == {"a", "c", "d"}
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) <= 1 << 20


def test_a_file_in_use_stays(folder: Path) -> None:
    make(folder / "a", 600_000)
    held = open_cached(folder / "a")
    with pytest.raises(CacheFullError, match=r"may take 1,048,576 bytes, and .* raise QUIRE_CACHE_BYTES"):
        make(folder / "b", 600_000)
    assert present(folder) == {"a"}, "and what failed leaves nothing"
    held.close()
    make(folder / "b", 600_000)
    assert present(folder) == {"b"}


def test_another_process_holds_a_file_too(folder: Path) -> None:
    make(folder / "a", 600_000)
    program = "import sys; from pathlib import Path; from engine.loading.node_cache import open_cached\n"
    program += "held = open_cached(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "a")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(CacheFullError):
            make(folder / "b", 600_000)
        holder.kill()
    make(folder / "b", 600_000)


def test_many_at_once_stay_within_the_bound(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: make(folder / name, 100_000), map(str, range(40))))
    assert sum(path.stat().st_blocks * 512 for path in folder.iterdir()) <= 1 << 20
    assert len(present(folder)) == 10


@pytest.mark.parametrize("text", ["0", "-1", "a lot", "1.5G", "10GB", "G"])
def test_a_bound_that_is_no_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("QUIRE_CACHE_BYTES", text)
    with pytest.raises(ConfigError, match=r"QUIRE_CACHE_BYTES=.* must be a number of bytes above 0"):
        cache_limit()


def test_the_bound_is_a_share_of_the_disk_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUIRE_CACHE_BYTES", raising=False)
    cache_folder().mkdir()
    assert cache_limit() == pytest.approx(0.9 * shutil.disk_usage(tmp_path).total, rel=1e-6)
    monkeypatch.setenv("QUIRE_CACHE_BYTES", "2G")
    assert cache_limit() == 2 << 30
