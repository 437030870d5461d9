"""Reading a start: the replica's own reason, and its progress from its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.progress import ReplicaLogs, reason

TRACEBACK = """A replica failed to start with exception. Retrying 1 more time(s). Error:
ray::ServeReplica:quire:engine-m.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "replica.py", line 1, in __init__
    open_checkpoint(source)
ValueError: the cause of it

During handling of the above exception, another exception occurred:

  File "loading.py", line 2, in f
engine.errors.ModelLoadError: /models/x/model.safetensors: truncated: 5 bytes of 8
"""


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (TRACEBACK, "/models/x/model.safetensors: truncated: 5 bytes of 8"),
        ("RuntimeError", "RuntimeError"),
        ("no traceback,\n only words", "no traceback, only words"),
    ],
)
def test_the_reason_is_the_last_error_in_one_line(message: str, expected: str) -> None:
    assert reason(message) == expected


def test_progress_is_the_models_last_whole_line(tmp_path: Path) -> None:
    logs = ReplicaLogs(tmp_path)
    assert logs.latest() == {}
    path = tmp_path / "replica_quire_engine-m_x1.log"
    path.write_text("INFO 2026 engine-m x1 -- Model m: loading weights 10 %\nINFO Model m: loading wei")
    assert logs.latest() == {"m": "loading weights 10 %"}
    with path.open("a") as file:
        file.write("ghts 80 %\nINFO Model org/n: warm-up\n")
    assert logs.latest() == {"m": "loading weights 80 %", "org/n": "warm-up"}
    assert logs.latest() == {"m": "loading weights 80 %", "org/n": "warm-up"}
