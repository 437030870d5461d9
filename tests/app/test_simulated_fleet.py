"""serve_configs/simulated_fleet.yaml, a real application: many calls in one HTTP request, and their receipts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import yaml

from app.ingress.receipt import FIELD, HEADER
from benchmarks.fleet.server import free_port, serving

pytestmark = [pytest.mark.slow, pytest.mark.ray]

CONFIG = Path(__file__).parents[2] / "serve_configs" / "simulated_fleet.yaml"


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"content-type": "application/json", HEADER: "1"}), timeout=60) as response:
        return dict(json.load(response))


def test_sixteen_prompts_of_one_request_are_spread_and_hang_nothing(tmp_path: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = free_port()
    with serving(config, tmp_path) as url:
        (state,) = ask(f"{url}/health")["models"]
        assert state["simulated"] == "prefill=6000,step_ms=20"
        assert "SIMULATED" in state["detail"]
        prompts = [[number + 5, *range(100, 1000)] for number in range(16)]
        fields = {"model": "simulated", "max_tokens": 4, "ignore_eos": True}
        first = ask(f"{url}/v1/completions", {**fields, "prompt": prompts})
        assert len(first["choices"]) == 16
        assert {choice["finish_reason"] for choice in first["choices"]} == {"length"}
        receipts = first[FIELD]
        assert len({receipt["replica"] for receipt in receipts}) == 4
        assert all(receipt["cached_tokens"] == receipt["expected_cached_tokens"] == 0 for receipt in receipts)
        assert max(receipt["predicted_wait_s"] for receipt in receipts) > 0
        # Another ingress may answer: it knows by the replicas' block events what they have cached.
        for number in range(4):
            (again,) = ask(f"{url}/v1/completions", {**fields, "prompt": prompts[number]})[FIELD]
            assert again["replica"] == receipts[number]["replica"]
            assert again["cached_tokens"] == again["expected_cached_tokens"] == 896
    console = (tmp_path / "console.log").read_text()
    assert "SIMULATED device (prefill=6000,step_ms=20)" in console
