"""A process that keeps one core busy, as a server beside the engine may."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It ends with its parent, even one that is killed.
_LOOP = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    pass
"""


@contextmanager
def busy_loop() -> Iterator[int]:
    """Spin on the last core that this process may use; yields the core's number."""
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", _LOOP, str(core)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()  # it runs now
            yield core
        finally:
            process.kill()
