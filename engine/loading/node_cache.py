"""Files that one process of a node makes and all of them read."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/quire`, by default `~/.cache/quire`. A relative path is not heeded, as the standard says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quire"


def make_once(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """`path`, after writing it unless it is there.

    Whoever comes while another process writes waits for it. The file appears whole or not at all: it is written under
    another name, which a failure removes.

    Args:
        path: a name that holds for one content only, as an existing file is never looked into.

    Raises:
        OSError: the folder cannot be written, or the disk is full; and whatever `write` raises.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of as the file closes
        if not path.is_file():
            partial = path.with_name(f"{path.name}.partial")  # one name: what a killed process left is overwritten
            try:
                with partial.open("wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    return path
