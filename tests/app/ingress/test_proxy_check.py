"""Processes that disagree about HAProxy are told apart, and told what to do."""

from __future__ import annotations

import pytest

from app.config import Proxy
from app.ingress.proxy_check import check_proxy, replica_has_haproxy
from engine.errors import ConfigError


@pytest.mark.parametrize(("wanted", "is_on"), [("serve", False), ("haproxy", True)])
def test_agreement_passes(wanted: Proxy, is_on: bool) -> None:
    check_proxy(wanted, is_on, is_on)


@pytest.mark.parametrize(
    ("wanted", "controller", "replica", "message"),
    [
        ("haproxy", True, False, "is on in Serve's controller and off in this ingress replica"),
        ("serve", False, True, "is off in Serve's controller and on in this ingress replica"),
        ("haproxy", False, False, "ingress.proxy='haproxy', but HAProxy mode is off: export RAY_SERVE_ENABLE_HA_PROXY"),
        ("serve", True, True, "ingress.proxy='serve', but HAProxy mode is on"),
    ],
)
def test_disagreement_is_named(wanted: Proxy, controller: bool, replica: bool, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_proxy(wanted, controller, replica)
    assert message in str(caught.value)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("true", False), (None, False)])
def test_the_variable_is_read_as_serve_reads_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", value)
    assert replica_has_haproxy() is expected
