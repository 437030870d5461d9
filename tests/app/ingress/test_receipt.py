"""Route receipts over HTTP: in the answer, and in the last event before a stream's end."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest

from app.ingress.receipt import FIELD, HEADER
from tests.app.ingress.doubles import chat, events

pytestmark = pytest.mark.anyio

ASK = {HEADER: "1"}
EXPECTED = {
    "replica": "replica-1",
    "expected_cached_tokens": 16,
    "cached_tokens": 3,
    "predicted_wait_s": 0.25,
    "wait_s": 0.125,
    "predicted_adapter_s": 0.0625,
    "predicted_cost_s": 0.5,
    "num_attempts": 1,
    "class": "default",
    "queued_s": 0.0625,
}


async def test_an_answer_carries_its_receipt(http: httpx2.AsyncClient) -> None:
    body = (await http.post("/v1/chat/completions", json=chat(), headers=ASK)).json()
    assert body[FIELD] == [{"request_id": body["id"], **EXPECTED}]


async def test_each_prompt_has_a_receipt(http: httpx2.AsyncClient) -> None:
    request = {"model": "tiny", "prompt": ["a", "b"], "n": 2}
    body = (await http.post("/v1/completions", json=request, headers=ASK)).json()
    assert [receipt["request_id"] for receipt in body[FIELD]] == [body["id"], f"{body['id']}-1"]


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
async def test_a_streams_last_event_carries_it(http: httpx2.AsyncClient, options: dict[str, Any]) -> None:
    response = await http.post("/v1/chat/completions", json=chat(stream=True, **options), headers=ASK)
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    last = json.loads(chunks[-1])
    assert last[FIELD] == [{"request_id": last["id"], **EXPECTED}]
    assert last["choices"] == []
    assert ("usage" in last) == bool(options)
    assert all(FIELD not in json.loads(chunk) for chunk in chunks[:-1])


@pytest.mark.parametrize("headers", [{}, {HEADER: "0"}])
async def test_nobody_who_does_not_ask_gets_one(http: httpx2.AsyncClient, headers: dict[str, str]) -> None:
    assert FIELD not in (await http.post("/v1/chat/completions", json=chat(), headers=headers)).json()
    response = await http.post("/v1/chat/completions", json=chat(stream=True), headers=headers)
    assert FIELD not in response.text


async def test_another_value_is_refused(http: httpx2.AsyncClient) -> None:
    response = await http.post("/v1/chat/completions", json=chat(), headers={HEADER: "please"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == HEADER
