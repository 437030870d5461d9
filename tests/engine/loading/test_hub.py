"""`hf:` sources: what is taken of a repository, offline mode, and errors. The hub is a few routes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.errors import ModelLoadError
from engine.loading import open_checkpoint
from tests.engine.loading.checkpoints import hf_model, save_hf
from tests.http_server import Handler, serving_http

ROOT = Path(__file__).parents[3]
COMMIT = "c" * 40
OPEN = """
import sys
from engine.loading import open_checkpoint
from engine.errors import QuireError
try:
    checkpoint = open_checkpoint(sys.argv[1])
    print(checkpoint.name, checkpoint.fingerprint)
except QuireError as error:
    print(error)
"""


class Hub(NamedTuple):
    """A hub with one repository, "org/tiny".

    Attributes:
        asked: paths of all requests.
    """

    url: str
    asked: list[str]


@contextmanager
def running_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub with these files."""
    all_asked: list[str] = []

    class Answer(Handler):
        def do_GET(self) -> None:  # noqa: N802  # the name is http.server's
            path = self.path.partition("?")[0]
            all_asked.append(f"{self.command} {path}")
            name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/").removeprefix("/org/tiny/resolve/main/")
            if path in ("/api/models/org/tiny", "/api/models/org/tiny/revision/main"):
                body = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
                self._answer(200, {"Content-Type": "application/json"}, body.encode())
            elif path.startswith("/api/models/org/tiny/tree/"):
                tree = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
                self._answer(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
            elif name in files:
                etag = f'"{sha1(files[name]).hexdigest()}"'
                self._answer(200, {"ETag": etag, "X-Repo-Commit": COMMIT}, files[name])
            else:
                code = "RevisionNotFound" if "/org/tiny/revision/" in path else "RepoNotFound"
                self._answer(404, {"X-Error-Code": "EntryNotFound" if "resolve" in path else code}, b"")

        do_HEAD = do_GET  # noqa: N815  # the name is http.server's

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    with serving_http(Answer) as url:
        yield Hub(url, all_asked)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_hf(hf_model("LlamaForCausalLM"), folder)
    return folder


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    with running_hub({**files, "original/model.safetensors": b"a copy", "pytorch_model.bin": b"pickled"}) as running:
        yield running


def open_in_a_process(source: str, home: Path, **environment: str) -> str:
    """The library reads its environment as it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, source],
        cwd=ROOT,
        env={"PATH": "", "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def test_a_repository_is_fetched_once_and_found_offline(hub: Hub, tiny: Path, tmp_path: Path) -> None:
    expected = open_checkpoint(str(tiny)).fingerprint
    assert open_in_a_process("hf:org/tiny", tmp_path, HF_ENDPOINT=hub.url).split()[1] == expected
    fetched = [asked for asked in hub.asked if asked.startswith("GET /org/tiny/resolve")]
    assert any(asked.endswith("/model.safetensors") for asked in fetched)
    assert not [asked for asked in hub.asked if "original" in asked or "pytorch_model" in asked]
    hub.asked.clear()
    offline = open_in_a_process("hf:org/tiny", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline.split()[1] == expected
    assert hub.asked == []


def test_errors_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    told = open_in_a_process("hf:org/none", tmp_path, HF_ENDPOINT=hub.url)
    assert told.startswith("hf:org/none: no such repository, or it is private and HF_TOKEN")
    told = open_in_a_process("hf:org/tiny", tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert told.startswith("hf:org/tiny: it is not in the hub's cache on this node")
    told = open_in_a_process("hf:org/tiny@v9", tmp_path, HF_ENDPOINT=hub.url)
    assert told.startswith("hf:org/tiny@v9: no such revision: v9")
    told = open_in_a_process("hf:org/tiny/q4.gguf", tmp_path, HF_ENDPOINT=hub.url)
    assert told.startswith("hf:org/tiny/q4.gguf: no such file")


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c.bin", "hf:a/b@", "hf:../b c"])
def test_names_that_are_none(source: str) -> None:
    with pytest.raises(ModelLoadError, match=r"expected hf:org/name"):
        open_checkpoint(source)
