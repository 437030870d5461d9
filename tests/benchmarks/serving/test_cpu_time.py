"""CPU time by process: who serves a port, and what they and their children have used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.serving.cpu_time import ServerProcesses

# Listens, burns half a second of CPU time in a child that ends, and as much in itself; then waits.
_SERVER = """
import socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.readline()
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.5: pass"])
while time.process_time() < 0.5:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_a_server_and_its_children_that_have_ended_are_counted(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    processes = ServerProcesses(int(server.stdout.readline()))
    assert processes.pids() == {server.pid}
    before = processes.seconds()
    server.stdin.write("go\n")
    server.stdin.flush()
    server.stdout.readline()
    used = processes.seconds() - before
    assert 0.85 < used < 1.5


def test_a_port_that_nobody_serves_is_an_error() -> None:
    with pytest.raises(ProcessLookupError, match="listens on port 1"):
        ServerProcesses(1)
