"""What a session has started is found, and ended, whoever its parent is by then."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from app.cli.processes import Process, descendants, terminate

# Starts a process that outlives it, as HAProxy outlives the Ray actor that started it.
_PARENT = "import subprocess, sys; subprocess.Popen(['sleep', '60']); sys.stdin.readline()"


def is_running(process: Process) -> bool:
    stat = Path(f"/proc/{process.pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_grandchild_that_outlives_its_parent_is_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdin=subprocess.PIPE) as parent:
        while not (found := descendants("sleep")):
            time.sleep(0.01)
        assert descendants("no-such-program") == []
    assert parent.returncode == 0
    (orphan,) = found
    assert is_running(orphan)
    terminate([orphan._replace(started_ticks=orphan.started_ticks - 1)])
    time.sleep(0.05)
    assert is_running(orphan), "a later process of the same id is another one"
    terminate(found)
    deadline = time.monotonic() + 5.0
    while is_running(orphan):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    terminate(found)
