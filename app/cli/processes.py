"""Processes that this one has started, near and far: what is left of them is taken down with the session."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process, told apart from a later one of the same id by when it began."""

    pid: int
    started_ticks: int


def descendants(name: str) -> list[Process]:
    """Children of this process, and theirs, whose program is called `name`."""
    children: dict[int, list[tuple[Process, str]]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # It may end while it is looked at.
        with contextlib.suppress(OSError):
            parent, process, program = _read(path)
            children.setdefault(parent, []).append((process, program))
    found, queue = [], [os.getpid()]
    while queue:
        for process, program in children.get(queue.pop(), []):
            queue.append(process.pid)
            if program == name:
                found.append(process)
    return found


def terminate(processes: list[Process]) -> None:
    """End those that still run."""
    for process in processes:
        with contextlib.suppress(OSError):
            if _read(Path(f"/proc/{process.pid}/stat"))[1] == process:
                os.kill(process.pid, signal.SIGTERM)


def _read(stat: Path) -> tuple[int, Process, str]:
    """Parent, process and program."""
    head, _, tail = stat.read_text().rpartition(")")
    pid, _, program = head.partition(" (")
    fields = tail.split()
    return int(fields[1]), Process(int(pid), int(fields[19])), program
