"""The other ranks as plain processes of this machine: for the offline API, and for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence

from engine.control.connection import Invitation

_STOP_S = 10.0


class WorkerProcesses:
    """Starts `python -m MODULE` for each rank, which reads its invitation with `read_invitation`.

    They end with this object, and, as their line to rank 0 breaks, with this process however it ends.
    """

    def __init__(self, module: str = "engine.execution.rank_process") -> None:
        self.host = "127.0.0.1"
        self._module = module
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        # However this process ends, if it ends by itself.
        weakref.finalize(self, _kill, self._processes)

    def launch(self, invitations: Sequence[Invitation]) -> None:
        """See WorkerLauncher."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for invitation in invitations:
            # The secret goes by a pipe: command lines can be read by anyone.
            process = subprocess.Popen(
                [sys.executable, "-m", self._module], stdin=subprocess.PIPE, stdout=sys.stderr, env=environment
            )
            self._processes[invitation.rank] = process
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:
                process.stdin.write("\n".join(map(str, invitation)).encode())

    def ended(self, rank: int) -> str | None:
        """See WorkerLauncher."""
        code = self._processes[rank].poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def pid(self, rank: int) -> int:
        """The rank's process."""
        return self._processes[rank].pid

    def close(self) -> None:
        """See WorkerLauncher."""
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_S)
        _kill(self._processes)


def read_invitation() -> Invitation:
    """In a process that WorkerProcesses has started: what stands on its standard input."""
    host, port, secret, rank = sys.stdin.read().split("\n")
    # Ctrl-C in a terminal reaches all its processes; rank 0 tells the others when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return Invitation(host, int(port), secret, int(rank))


def _kill(processes: dict[int, subprocess.Popen[bytes]]) -> None:
    """Whoever has not ended by itself, told to or at the end of its line."""
    for process in processes.values():
        process.kill()
        process.wait()
