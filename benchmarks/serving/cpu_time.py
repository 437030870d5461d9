"""CPU time of all processes behind a local URL: the server's, and Ray's where the server runs on Ray."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_LISTENING = "0A"
# The kernel's number for "CPU time of a whole process", in the clock ids that it makes of process ids.
_CPUCLOCK_SCHED = 2


class ServerProcesses:
    """The processes that serve a port, looked for anew at each reading, for some come and go.

    They are the one that listens and its descendants; where a raylet is among its ancestors, all of that Ray session.

    Raises:
        ProcessLookupError: nothing on this machine listens there.
    """

    def __init__(self, port: int) -> None:
        listeners = list(_listeners(port))
        if not listeners:
            raise ProcessLookupError(f"no process of this machine listens on port {port}")
        raylet = next((pid for pid in _ancestors(listeners[0]) if _command(pid)[:1] == ["raylet"]), None)
        self._listener = listeners[0]
        self._session = None if raylet is None else _session_of(_raw_command(raylet))

    def pids(self) -> set[int]:
        """Who they are now."""
        parents = _parents()
        if self._session is None:
            roots = {self._listener}
        else:
            roots = {pid for pid in parents if self._session in _raw_command(pid)}
            # A driver that has started Ray itself, as `make serve` does, is part of the server.
            roots |= {parents[pid] for pid in roots if _is_python(parents.get(pid, 0))}
        children: dict[int, list[int]] = {}
        for pid, parent in parents.items():
            children.setdefault(parent, []).append(pid)
        found: set[int] = set()
        queue = list(roots)
        while queue:
            pid = queue.pop()
            if pid not in found:
                found.add(pid)
                queue += children.get(pid, [])
        return found - {os.getpid()}

    def by_process(self) -> dict[tuple[int, str], float]:
        """CPU seconds so far of each process, those of its children that have ended included."""
        seconds = {}
        for pid in self.pids():
            with contextlib.suppress(OSError):
                seconds[pid, _title(pid)] = _seconds(pid)
        return seconds

    def seconds(self) -> float:
        """CPU seconds so far of all of them."""
        return sum(self.by_process().values())


def own_seconds() -> float:
    """CPU seconds of this process."""
    return time.process_time()


def _seconds(pid: int) -> float:
    # In nanoseconds, where /proc has ticks of 10 ms; only what ended children have used has to come from there.
    own = time.clock_gettime(((~pid) << 3) | _CPUCLOCK_SCHED)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return own + (int(fields[13]) + int(fields[14])) / _TICKS


def _listeners(port: int) -> Iterator[int]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for link in folder.iterdir():
                with contextlib.suppress(OSError):
                    if str(link.readlink()) in inodes:
                        yield int(folder.parent.name)
                        break


def _parents() -> dict[int, int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return parents


def _ancestors(pid: int) -> Iterator[int]:
    parents = _parents()
    while pid > 1:
        yield pid
        pid = parents.get(pid, 0)


def _raw_command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _command(pid: int) -> list[str]:
    words = _raw_command(pid).split()
    return [Path(words[0]).name, *words[1:]] if words else []


def _title(pid: int) -> str:
    return " ".join(_command(pid)[:3])[:60]


def _is_python(pid: int) -> bool:
    return pid > 1 and _command(pid)[:1] != [] and _command(pid)[0].startswith("python")


def _session_of(command: str) -> str | None:
    found = re.search(r"session_\d[\d_-]+", command)
    return found[0] if found else None
