"""What a start looks like from the console: Ray, Serve, each model's loading, and the reason if it fails."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape

from app.cli.config_file import LoadedConfig
from app.ingress.greeting import dialable
from engine.errors import QuireError

_POLL_S = 0.2
# Errors that another attempt would meet again: no use in waiting for Serve's retries.
_PERMANENT = ("ConfigError", "ModelLoadError", "UnsupportedModelError")
_ERROR_LINE = re.compile(r"^(?:\s*)(?:[\w.]+\.)?(\w*(?:Error|Exception))(?:: (.*))?$", re.MULTILINE)


class DeploymentFailedError(QuireError):
    """A deployment did not come up; the message is the replica's own reason, in one line."""


class StartupView:
    """Phases as they run, with the seconds each took. Without a terminal: a line for each phase that ended."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the moving line off the console. Idempotent."""
        self._status.stop()

    def show(self, text: str) -> None:
        """What is going on now."""
        self._status.update(f"{escape(text)} [dim]{time.monotonic() - self._began:.0f} s[/dim]")

    def done(self, text: str, seconds: float) -> None:
        """A phase has ended."""
        self._console.print(f"[green]✓[/green] {escape(text)} [dim]{seconds:.1f} s[/dim]", soft_wrap=True)

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show a phase while the body runs."""
        began = time.monotonic()
        self.show(f"{text} …")
        yield
        self.done(text, time.monotonic() - began)


def follow_startup(client: Any, config: LoadedConfig, view: StartupView, stop: threading.Event) -> None:
    """Show each model's progress until the ingress says that all are ready, or `stop` is set. A model that begins
    without a replica is ready as it is: its first request starts one.

    Args:
        client: Serve's client.

    Raises:
        DeploymentFailedError: an application or a replica failed to start.
    """
    began = time.monotonic()
    logs = ReplicaLogs(_serve_log_folder())
    waiting = {model.id for model in config.models if model.deployment.first_replicas}
    while not stop.wait(_POLL_S):
        for name in config.apps:
            _raise_if_failed(client.get_serve_status(name))
        news = logs.latest()
        for model_id in sorted(waiting):
            if news.get(model_id, "").startswith("ready"):
                waiting.discard(model_id)
                view.done(f"{model_id}: {news[model_id]}", time.monotonic() - began)
        if not waiting and _is_healthy(config):
            return
        shown = [f"{model_id}: {news.get(model_id, 'starting its replica')}" for model_id in sorted(waiting)]
        view.show("; ".join(shown) or "connecting the ingress")


class ReplicaLogs:
    """The latest line of progress of each model, from the replicas' log files (`Model ID: what`)."""

    _LINE = re.compile(r"Model (\S+): (.+?)\s*$")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self._latest: dict[str, str] = {}

    def latest(self) -> dict[str, str]:
        """Model id → what its replica said last."""
        for path in self._folder.glob("replica_*.log"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            # A line that is still being written is left for the next look.
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if found := self._LINE.search(_message(line)):
                    model_id, what = found.groups()
                    self._latest[model_id] = re.sub(r" -- \S+$", "", what)
        return self._latest


def _message(line: str) -> str:
    """What a line of a log says: all of it, but for a config whose `logging_config` asks for JSON."""
    if line.startswith("{"):
        with suppress(ValueError):
            return str(json.loads(line).get("message", ""))
    return line


def reason(message: str) -> str:
    """The one line that matters in what Serve reports of a failed replica: the last error of its traceback."""
    found = _ERROR_LINE.findall(message)
    if not found:
        return " ".join(message.split())[:500]
    kind, text = found[-1]
    return str(text or kind)


def _raise_if_failed(status: Any) -> None:
    app = status.app_status
    messages = [deployment.message for deployment in status.deployment_statuses]
    if app.status == "DEPLOY_FAILED":
        # The application's message names the deployment; the deployment's has the replica's traceback.
        failed = [message for message in messages if _ERROR_LINE.search(message)]
        raise DeploymentFailedError(reason(failed[0] if failed else app.message))
    for message in messages:
        found = _ERROR_LINE.findall(message)
        if found and found[-1][0] in _PERMANENT:
            raise DeploymentFailedError(reason(message))


def _serve_log_folder() -> Path:
    import ray

    node: Any = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) / "serve"


def _is_healthy(config: LoadedConfig) -> bool:
    """Whether every application's /health says yes, through the proxy as clients see it."""
    parts = urlsplit(dialable(config.url))
    for prefix in config.route_prefixes:
        connection = HTTPConnection(str(parts.hostname), parts.port, timeout=2.0)
        try:
            connection.request("GET", f"{prefix.rstrip('/')}/health")
            if connection.getresponse().status != 200:
                return False
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()
    return True
