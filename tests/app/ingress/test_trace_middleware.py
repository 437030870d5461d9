"""The application under TraceMiddleware, and the spans that a request makes in its ingress."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from opentelemetry.trace import SpanKind
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.telemetry import spans
from engine.errors import OverloadedError, RequestError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, http_client
from tests.app.telemetry.collected import Collected, attributes_of

pytestmark = pytest.mark.anyio

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROOT = "POST /v1/chat/completions"


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.fixture
async def http(model: ScriptedClient, tokenizer: Tokenizer, collected: Collected) -> AsyncIterator[httpx2.AsyncClient]:
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)], {"small": "tiny"})
    async with http_client(build_asgi_app(registry, tracing=collected.tracing)) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_the_spans_of_an_answered_request(http: httpx2.AsyncClient, collected: Collected, stream: bool) -> None:
    body = chat(model="small", stream=stream, temperature=0.5, max_tokens=50, seed=3)
    answer = await http.post(ROOT.split()[1], json=body)
    assert answer.status_code == 200
    assert collected.tree() == {"": [ROOT], ROOT: ["receive", "tokenize", "detokenize"]}
    root = collected.named(ROOT)
    assert root.context is not None
    assert answer.headers["traceresponse"] == f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-01"
    assert root.kind is SpanKind.SERVER
    assert root.status.is_unset
    attributes = attributes_of(root)
    assert 0 < float(str(attributes.pop(spans.TIME_TO_FIRST_CHUNK))) < 5
    assert str(attributes.pop(spans.RESPONSE_ID)).startswith("chatcmpl-")
    assert attributes == {
        spans.REQUEST_METHOD: "POST",
        spans.HTTP_ROUTE: "/v1/chat/completions",
        spans.URL_PATH: "/v1/chat/completions",
        spans.URL_SCHEME: "http",
        spans.STATUS_CODE: 200,
        spans.OPERATION: "chat",
        spans.PROVIDER: "quire",
        spans.REQUEST_MODEL: "small",
        spans.RESPONSE_MODEL: "tiny",
        spans.REQUEST_STREAM: stream,
        spans.REQUEST_TEMPERATURE: 0.5,
        spans.REQUEST_MAX_TOKENS: 50,
        spans.REQUEST_SEED: 3,
        spans.RESPONSE_FINISH_REASONS: ["stop"],
        spans.INPUT_TOKENS: attributes[spans.INPUT_TOKENS],
        spans.OUTPUT_TOKENS: attributes[spans.OUTPUT_TOKENS],
        spans.CACHED_INPUT_TOKENS: 3,
    }
    assert attributes_of(collected.named("detokenize"))[spans.BUSY_TIME] != 0.0


async def test_no_text_of_the_request_or_the_answer(http: httpx2.AsyncClient, collected: Collected) -> None:
    await http.post(ROOT.split()[1], json=chat("a secret question"))
    said = " ".join(str(attributes_of(span)) for span in collected.spans)
    assert "secret" not in said
    assert "Paris" not in said


async def test_it_goes_on_from_the_clients_trace(http: httpx2.AsyncClient, collected: Collected) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    answer = await http.post(ROOT.split()[1], json=chat(), headers=headers)
    assert answer.headers["traceresponse"].startswith(f"00-{TRACE}-")
    for span in collected.spans:
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == TRACE
        assert span.context.trace_state.to_header() == "vendor=1"
    root = collected.named(ROOT)
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT


async def test_what_the_client_does_not_sample_leaves_nothing(http: httpx2.AsyncClient, collected: Collected) -> None:
    answer = await http.post(ROOT.split()[1], json=chat(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert "traceresponse" not in answer.headers
    assert collected.spans == ()


async def test_other_endpoints_are_not_traced(http: httpx2.AsyncClient, collected: Collected) -> None:
    for path in ("/health", "/metrics", "/v1/models"):
        assert "traceresponse" not in (await http.get(path)).headers
    assert (await http.get(ROOT.split()[1])).status_code == 405
    assert collected.spans == ()


@pytest.mark.parametrize(
    ("error", "code", "description"),
    [
        (RequestError("no"), 400, None),
        (OverloadedError("full"), 429, "Too Many Requests"),
        (ValueError("a fault"), 500, "Internal Server Error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures(
    http: httpx2.AsyncClient,
    collected: Collected,
    model: ScriptedClient,
    error: Any,
    code: int,
    description: str | None,
    stream: bool,
) -> None:
    model.refusal = error
    answer = await http.post(ROOT.split()[1], json=chat(stream=stream))
    assert answer.status_code == code
    root = collected.named(ROOT)
    assert root.status.description == description
    assert attributes_of(root)[spans.STATUS_CODE] == code
    assert attributes_of(root)[spans.ERROR_TYPE] == str(code)
    assert "traceresponse" in answer.headers


async def test_a_stream_that_fails_after_its_200(
    http: httpx2.AsyncClient, collected: Collected, model: ScriptedClient
) -> None:
    model.failure = (2, OverloadedError("too far behind"))
    answer = await http.post(ROOT.split()[1], json=chat(stream=True))
    assert answer.status_code == 200
    root = collected.named(ROOT)
    assert (attributes_of(root)[spans.STATUS_CODE], root.status.description) == (429, "Too Many Requests")


async def test_a_body_that_is_wrong_ends_the_receive_span(http: httpx2.AsyncClient, collected: Collected) -> None:
    assert (await http.post(ROOT.split()[1], json={"model": "tiny"})).status_code == 400
    assert collected.tree() == {"": [ROOT], ROOT: ["receive"]}
    assert "messages" in str(collected.named("receive").status.description)


async def test_a_client_that_goes_away(http: httpx2.AsyncClient, collected: Collected, model: ScriptedClient) -> None:
    model._step_s = 5.0
    asking = asyncio.ensure_future(http.post(ROOT.split()[1], json=chat()))
    await asyncio.sleep(0.1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    root = collected.named(ROOT)
    assert root.status.description == "the client went away"


async def test_every_prompt_of_a_request_is_detokenised_in_its_trace(
    http: httpx2.AsyncClient, collected: Collected
) -> None:
    body = {"model": "tiny", "prompt": ["one", "two", "three"], "max_tokens": 4, "n": 2}
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    root = collected.named("POST /v1/completions")
    assert collected.tree()[root.name] == ["receive", "tokenize", *["detokenize"] * 3]
    attributes = attributes_of(root)
    assert attributes[spans.OPERATION] == "text_completion"
    assert attributes[spans.RESPONSE_FINISH_REASONS] == ["length"] * 6
    assert attributes[spans.REQUEST_CHOICES] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_and_answer_if_they_are_asked_for(
    model: ScriptedClient, tokenizer: Tokenizer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = Collected(captures_content=True)
    registry = ModelRegistry([ServedModel("tiny", model, tokenizer, 2048)])
    async with http_client(build_asgi_app(registry, tracing=collected.tracing)) as http:
        await http.post(ROOT.split()[1], json=chat("What is the capital?", stream=stream))
        monkeypatch.setattr(collected.tracing, "max_text_length", 20)
        await http.post("/v1/completions", json={"model": "tiny", "prompt": ["one", "two"], "stream": stream})
    attributes = attributes_of(collected.named(ROOT))
    asked = json.loads(str(attributes[spans.INPUT_MESSAGES]))
    assert asked[-1] == {"role": "user", "parts": [{"type": "text", "content": "What is the capital?"}]}
    answer = {"type": "text", "content": "Paris is the capital of France."}
    expected = [{"role": "assistant", "parts": [answer], "finish_reason": "stop"}]
    assert json.loads(str(attributes[spans.OUTPUT_MESSAGES])) == expected
    attributes = attributes_of(collected.named("POST /v1/completions"))
    assert attributes[spans.INPUT_MESSAGES] == '[{"role": "user", "p'
    assert attributes[spans.OUTPUT_MESSAGES] == '[{"role": "assistant'


async def test_histograms_name_a_trace(http: httpx2.AsyncClient, collected: Collected) -> None:
    await http.post(ROOT.split()[1], json=chat(max_tokens=4))
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    answer = await http.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    named = {
        sample.name: sample.exemplar.labels
        for family in openmetrics_families(answer.text)  # type: ignore[no-untyped-call]
        for sample in family.samples
        if sample.exemplar is not None
    }
    root = collected.named(ROOT)
    assert root.context is not None
    labels = {"trace_id": f"{root.context.trace_id:032x}", "span_id": f"{root.context.span_id:016x}"}
    assert named == {
        "quire_time_to_first_token_seconds_bucket": labels,
        "quire_time_per_output_token_seconds_bucket": labels,
        "quire_request_queue_seconds_bucket": labels,
        "quire_request_duration_seconds_bucket": labels,
    }
    # Prometheus' older format has no exemplars.
    plain = await http.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "trace_id" not in plain.text


async def test_a_request_that_is_not_sampled_is_no_exemplar(http: httpx2.AsyncClient) -> None:
    await http.post(ROOT.split()[1], json=chat(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    answer = await http.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert "quire_request_duration_seconds_bucket" in answer.text
    assert "trace_id" not in answer.text
