from __future__ import annotations

import httpx2
import pytest
from starlette.datastructures import Headers

from app.balancer import RequestTerms
from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.ingress.request_terms import request_terms
from engine.errors import OverloadedError, RequestError
from tests.app.ingress.doubles import ScriptedClient, chat

SETTINGS = AdmissionSettings(
    classes={"chat": ClassSettings(0, 2.0), "batch": ClassSettings(3, 300.0)}, default_class="chat"
)
BY_HEADER = AdmissionSettings(tenant_header=True)


def terms(headers: dict[str, str] | None = None, body: bytes = b"body", tenant: str = "key-1") -> RequestTerms:
    return request_terms(Headers(headers or {}), SETTINGS, tenant, body)


def test_without_headers_it_is_the_default_class_and_the_keys_tenant() -> None:
    found = terms()
    assert found[:4] == ("chat", 0, 2.0, "key-1")


def test_class_deadline_and_tenant_by_header() -> None:
    assert terms({"x-quire-class": "batch"})[:3] == ("batch", 3, 300.0)
    assert terms({"x-quire-deadline-ms": "750"}).ttft_deadline_s == 0.75
    assert request_terms(Headers({}), BY_HEADER, "key-1", b"").tenant == "key-1"
    assert request_terms(Headers({"x-quire-tenant": "team:a@x"}), BY_HEADER, "key-1", b"").tenant == "team:a@x"


def test_the_same_request_of_the_same_tenant_is_known_again() -> None:
    assert terms().fingerprint == terms({"x-quire-deadline-ms": "900"}).fingerprint != 0
    others = [terms(body=b"other"), terms(tenant="key-2"), terms({"x-quire-class": "batch"})]
    assert len({terms().fingerprint, *(one.fingerprint for one in others)}) == 4


@pytest.mark.parametrize(
    ("settings", "headers", "message"),
    [
        (SETTINGS, {"x-quire-class": "gold"}, "no class 'gold'; known: chat, batch"),
        (SETTINGS, {"x-quire-tenant": "a"}, "tenant_header is off"),
        (BY_HEADER, {"x-quire-tenant": "a b"}, "must begin with a letter or digit"),
        (BY_HEADER, {"x-quire-tenant": ""}, "must begin with a letter or digit"),
        (SETTINGS, {"x-quire-deadline-ms": "0"}, "1 to 3600000"),
        (SETTINGS, {"x-quire-deadline-ms": "-5"}, "1 to 3600000"),
        (SETTINGS, {"x-quire-deadline-ms": "1.5"}, "1 to 3600000"),
        (SETTINGS, {"x-quire-deadline-ms": "3600001"}, "1 to 3600000"),
        (SETTINGS, {"x-quire-deadline-ms": "1" * 5000}, "1 to 3600000"),
        (SETTINGS, {"x-quire-deadline-ms": ""}, "1 to 3600000"),
    ],
)
def test_bad_headers(settings: AdmissionSettings, headers: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        request_terms(Headers(headers), settings, "", b"")
    assert message in str(caught.value)
    assert caught.value.param in headers


@pytest.mark.anyio
async def test_over_http(http: httpx2.AsyncClient, model: ScriptedClient) -> None:
    model.settings = SETTINGS
    answer = await http.post("/v1/chat/completions", json=chat(), headers={"x-quire-class": "batch"})
    assert answer.status_code == 200
    assert model.terms[0].class_name == "batch"
    assert model.terms[0].tenant == "anonymous"
    answer = await http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]})
    assert len({one.fingerprint for one in model.terms}) == 3, "each prompt of a request is known by itself"
    answer = await http.post("/v1/chat/completions", json=chat(), headers={"x-quire-class": "gold"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unknown_class"


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_429_and_tells_when_to_come_again(
    http: httpx2.AsyncClient, model: ScriptedClient, stream: bool
) -> None:
    model.refusal = OverloadedError("overloaded: try again in 7 s", 7)
    answer = await http.post("/v1/chat/completions", json=chat(stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "7"
    error = answer.json()["error"]
    assert error == {
        "message": "overloaded: try again in 7 s",
        "type": "rate_limit_error",
        "param": None,
        "code": "overloaded",
        "retry_after": 7,
    }
