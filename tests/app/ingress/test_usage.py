"""What HTTP requests leave in the usage ledger: whose they were, of which model, and how they ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from app.balancer.admission_settings import AdmissionSettings
from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.settings import HttpSettings
from app.usage import UsageLedger, UsageSettings
from app.usage.records import UsageRecord
from app.usage.segment import decode_lines
from app.usage.totals import UsageCounts
from engine.errors import EngineDeadError, OverloadedError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, http_client
from tests.app.usage.helpers import counts

pytestmark = pytest.mark.anyio
TIMEOUT_S = 60.0


@pytest.fixture
def ledger(tmp_path: Path) -> UsageLedger:
    return UsageLedger(UsageSettings(tmp_path), "ingress-1")


@pytest.fixture
async def http(
    model: ScriptedClient, tokenizer: Tokenizer, ledger: UsageLedger, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx2.AsyncClient]:
    monkeypatch.setattr(model, "settings", AdmissionSettings(tenant_header=True))
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048, adapters=("sql",))], {"small": "tiny"})
    async with http_client(build_asgi_app(registry, HttpSettings(access_log=True), ledger=ledger)) as client:
        yield client
    ledger.close()


def records(directory: Path) -> list[UsageRecord]:
    found: list[UsageRecord] = []
    for path in (directory / "segments").iterdir():
        found += [line for line in decode_lines(path.read_bytes().splitlines(True)) if isinstance(line, UsageRecord)]
    return found


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_by_tenant_model_and_adapter(
    http: httpx2.AsyncClient, ledger: UsageLedger, tmp_path: Path, stream: bool
) -> None:
    headers = {"x-quire-tenant": "acme"}
    answer = await http.post("/v1/chat/completions", json=chat(max_tokens=4, stream=stream), headers=headers)
    await http.post("/v1/chat/completions", json=chat(model="tiny:sql", stream=stream), headers=headers)
    await http.post("/v1/completions", json={"model": "small", "prompt": ["one", "two"], "stream": stream})
    assert ledger.flush(TIMEOUT_S)
    ends = [record for record in records(tmp_path) if record.kind == "end"]
    assert [(each.tenant, each.model, each.adapter) for each in ends] == [
        ("acme", "tiny", ""),
        ("acme", "tiny", "sql"),
        ("anonymous", "tiny", ""),
    ]
    first = ends[0]
    assert first.request_id in answer.text
    assert (first.status, first.finish, first.output_tokens, first.cached_tokens) == (200, "length", 4, 3)
    assert ends[1].finish == "stop"
    # Two prompts are one request.
    assert counts(tmp_path)["anonymous"].requests == 1
    assert counts(tmp_path)["anonymous"].cached_tokens == 6


async def test_what_fails_or_is_refused(
    http: httpx2.AsyncClient, model: ScriptedClient, ledger: UsageLedger, tmp_path: Path
) -> None:
    model.failure = (3, EngineDeadError("gone"))
    await http.post("/v1/chat/completions", json=chat(stream=True))
    await http.post("/v1/chat/completions", json=chat())
    model.refusal = OverloadedError("full")
    await http.post("/v1/chat/completions", json=chat())
    await http.post("/v1/chat/completions", json=chat(model="nobody"))
    assert ledger.flush(TIMEOUT_S)
    ends = [record for record in records(tmp_path) if record.kind == "end"]
    assert [(each.status, each.output_tokens, each.finish) for each in ends] == [
        (503, 3, ""),
        (503, 3, ""),
        (429, 0, ""),
    ]
    prompt = ends[0].prompt_tokens
    assert counts(tmp_path) == {"anonymous": UsageCounts(3, 1, 0, 2 * prompt, 6, 6)}


async def test_a_disk_that_is_gone_fails_no_request(
    http: httpx2.AsyncClient, ledger: UsageLedger, tmp_path: Path
) -> None:
    for path in (tmp_path / "segments").iterdir():
        path.unlink()
    (tmp_path / "segments").rmdir()
    (tmp_path / "segments").write_text("in the way")
    assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
    assert not ledger.flush(0.2)
    assert ledger.stats.errors["write"] > 0
    (tmp_path / "segments").unlink()
    assert ledger.flush(TIMEOUT_S)
    assert counts(tmp_path)["anonymous"].requests == 1
