from __future__ import annotations

import hashlib

import pytest
from starlette.requests import Request

from app.ingress.auth import ANONYMOUS, ApiKeys
from app.ingress.errors import AuthenticationError


def request(key: str | None = None) -> Request:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    return Request({"type": "http", "headers": headers})


def test_a_keys_tenant_is_made_from_its_digest() -> None:
    keys = ApiKeys(["sk-one", "sk-two"])
    tenant = keys.check(request("sk-one"))
    assert tenant == "key-" + hashlib.sha256(b"sk-one").hexdigest()[:12]
    assert "sk-one" not in tenant
    assert keys.check(request("sk-two")) != tenant
    with pytest.raises(AuthenticationError):
        keys.check(request("sk-three"))


def test_a_key_beyond_ascii_is_known() -> None:
    assert ApiKeys(["sk-schlüssel-鍵"]).check(request("sk-schlüssel-鍵")).startswith("key-")


def test_where_no_keys_are_asked_for_a_made_up_one_is_no_tenant_of_its_own() -> None:
    assert ApiKeys().check(request("sk-made-up")) == ApiKeys().check(request()) == ANONYMOUS
