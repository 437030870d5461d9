"""The metrics benchmark records what an ingress would, and says the share that it was asked for."""

from __future__ import annotations

import json

import pytest

from app.telemetry.ingress_metrics import IngressMetrics
from benchmarks import metrics


def test_a_request_is_recorded_in_full() -> None:
    own = IngressMetrics()
    metrics._record(own)
    found = {(item.name, item.labels.get("code")): item.value for item in own.samples() if item.name.endswith("_total")}
    assert found["quire_requests_total", "200"] == 1
    observed = {item.name for item in own.samples() if item.name.endswith("_count") and item.value == 1}
    assert len(observed) == 4, "first token, token, queue, whole"


def test_the_share_is_of_what_a_token_costs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["metrics", "--repeats", "5", "--token-us", "500", "--replicas", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    metrics.main()
    result = json.loads(capsys.readouterr().out)
    assert result["request_us"] > 0
    assert result["share_percent"] == pytest.approx(result["per_token_us"] / 5, abs=0.001)
