"""Files that one process of a node makes and all of them read, within a bound on what they take together."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.errors import ConfigError

# Bytes that the cache may take, e.g. "300G"; by default DEFAULT_SHARE of its file system.
LIMIT_VARIABLE = "QUIRE_CACHE_BYTES"
DEFAULT_SHARE = 0.9

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Beside each file: locks, and what is known of it. They are small, and never evicted for their size.
_SIDE_FILES = (".lock", ".state")


class CacheFullError(OSError):
    """What is to be written does not fit: the bound is too small, or all that is there is in use."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class CachedFile:
    """A file of the cache in use: it is not evicted before this object is closed or collected.

    Each use holds a shared lock on the file itself; whoever evicts it must get the exclusive one.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/quire`, by default `~/.cache/quire`. A relative path is not heeded, as the standard says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quire"


def cache_limit() -> int:
    """Bytes that the cache may take on its file system.

    Raises:
        ConfigError: QUIRE_CACHE_BYTES is no number of bytes.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip()
    if not text:
        statistics = os.statvfs(cache_folder())
        return int(statistics.f_blocks * statistics.f_frsize * DEFAULT_SHARE)
    number, unit = text.rstrip("KMGT"), text[len(text.rstrip("KMGT")) :]
    if not number.isdecimal() or unit not in _UNITS or int(number) == 0:
        raise ConfigError(
            f"{LIMIT_VARIABLE}={text!r} must be a number of bytes above 0, e.g. 300G (K, M, G, T of 1024)"
        )
    return int(number) * _UNITS[unit]


def open_cached(path: Path, create: bool = False) -> CachedFile:
    """Open a file of the cache for use, and mark it as used now.

    Raises:
        FileNotFoundError: it is not there, and `create` is false.
    """
    flags = os.O_CLOEXEC | (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY)
    while True:
        file = CachedFile(path, os.open(path, flags, 0o644))
        fcntl.flock(file.fd, fcntl.LOCK_SH)
        if os.fstat(file.fd).st_nlink:  # not evicted between the two lines above
            break
        file.close()
    with contextlib.suppress(OSError):  # another user's, or on a disk that is read only
        os.utime(path)
    return file


def make_once(path: Path, write: Callable[[BinaryIO], object]) -> CachedFile:
    """`path`, in use, after writing it unless it is there.

    Whoever comes while another process writes waits for it. The file appears whole or not at all: it is written under
    another name, which a failure removes.

    Args:
        path: a name that holds for one content only, as an existing file is never looked into.
        write: calls `reserve` with the size as soon as that is known.

    Raises:
        OSError: the folder cannot be written, or the disk is full; and whatever `write` raises.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_cached(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f"{path.name}.lock")):
        with contextlib.suppress(FileNotFoundError):
            return open_cached(path)
        # One name: what a killed process left is overwritten.
        cached = open_cached(path.with_name(f"{path.name}.partial"), create=True)
        partial = cached.path
        try:
            os.ftruncate(cached.fd, 0)
            with os.fdopen(os.dup(cached.fd), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            with _room():  # who counts the files meanwhile could see neither name
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        cached.path = path
        return cached


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file exclusively; waits for it."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of as the file closes
        yield


def reserve(fd: int, ranges: list[range]) -> None:
    """Take room on the disk for byte ranges of a file of the cache before they are written, evicting others for it.

    Raises:
        CacheFullError: the bound does not allow it, even without all that nobody uses.
        OSError: the disk is full.
    """
    num_bytes = sum(map(len, ranges))
    with _room():
        limit = cache_limit()
        free_up(cache_folder(), limit - num_bytes, num_bytes, limit)
        for part in ranges:
            _allocate(fd, part)


@contextmanager
def _room() -> Iterator[None]:
    """Hold what the cache takes still: nobody else reserves, evicts or renames."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "room.lock"):
        yield


def free_up(folder: Path, target: int, wanted: int, limit: int) -> None:
    """Remove files that nobody uses, the longest unused first, until all take `target` bytes at most."""
    files = sorted(_files(folder), key=lambda file: file.used_at_ns)
    total = sum(file.num_bytes for file in files)
    removed = False
    for file in files:
        if total <= target:
            break
        if _evict(file.path):
            total -= file.num_bytes
            removed = True
    if removed:
        _prune_snapshots(folder)
    if total > target:
        raise CacheFullError(
            f"the cache {folder} may take {limit:,} bytes, and {total:,} of them are in use: there is no room for "
            f"{wanted:,} more; raise {LIMIT_VARIABLE}, or give the cache a larger place by XDG_CACHE_HOME"
        )


class _File(NamedTuple):
    path: Path
    num_bytes: int
    used_at_ns: int


def _files(folder: Path) -> Iterator[_File]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not name.endswith(_SIDE_FILES) and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield _File(path, status.st_blocks * 512, status.st_mtime_ns)


def _evict(path: Path) -> bool:
    """Remove a file unless it is in use."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # First what says which bytes are there: if we are killed in between, none count as there.
        path.with_name(f"{path.name}.state").unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(fd)
    return True


def _prune_snapshots(folder: Path) -> None:
    """Folders of links (see s3_folder.py), all of whose files have gone."""
    for snapshot in (folder / "s3" / "snapshots").glob("*"):
        if not any(link.exists() for link in snapshot.glob("*/*")):
            shutil.rmtree(snapshot, ignore_errors=True)


def _allocate(fd: int, part: range) -> None:
    if not part:
        return
    try:
        os.posix_fallocate(fd, part.start, len(part))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot: no promise
            raise
