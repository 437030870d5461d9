"""Ingresses of one application in one process, with one scripted model: what `/metrics` is asked of in tests."""

from __future__ import annotations

from typing import Any

import httpx2
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from app.telemetry.application import ApplicationMetrics, IngressSamples
from app.telemetry.model_samples import ModelTelemetry, RouteCounts, ScalingTelemetry
from app.transport.counter_messages import ReplicaCounters
from app.usage.writer import UsageStats
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import ScriptedClient, chat

TEXT = "Paris is the capital of France."
COUNTERS = ReplicaCounters(
    token_state_slots=40,
    reserved_slots=8,
    internal_fragmentation_slots=16,
    cached_slots=32,
    empty_slots=64,
    swapped_slots=16,
    free_swap_slots=48,
    num_running=3,
    num_waiting=5,
    num_swapped=2,
    num_swaps=7,
    num_recomputations=11,
    num_prompt_tokens=1000,
    num_cached_tokens=250,
    num_output_tokens=500,
    num_steps=90,
    schedule_s=0.5,
    execute_s=4.0,
    process_s=0.25,
    num_adapters=2,
    adapter_bytes=4096,
    num_adapter_loads=6,
    num_adapter_evictions=4,
    adapter_load_s=1.5,
    num_adapter_load_failures=3,
)

SCALING = ScalingTelemetry(
    target=3, states={"running": 1, "starting": 2, "stopping": 0}, decisions={("up", "prompts"): 4, ("down", "idle"): 1}
)


class World:
    """Ingresses of one application in one process, with one scripted model that they all know."""

    def __init__(self, tokenizer: Tokenizer, *names: str) -> None:
        self.tokenizer = tokenizer
        self.clients: dict[str, ScriptedClient] = {}
        self.metrics: dict[str, ApplicationMetrics] = {}
        self.http: dict[str, httpx2.AsyncClient] = {}
        self.gone: set[str] = set()
        for name in names:
            client = self.clients[name] = ScriptedClient(tokenizer, TEXT, num_cached_tokens=3)
            client.told = ModelTelemetry(RouteCounts(), 0, 0, 1, {"replica-1": COUNTERS})
            registry = ModelRegistry([ServedModel("tiny", client, tokenizer, 2048)], {"small": "tiny"})
            usage = UsageStats()
            metrics = self.metrics[name] = ApplicationMetrics(name, registry.__iter__, self.gather, self.scaling, usage)
            transport = httpx2.ASGITransport(app=build_asgi_app(registry, metrics=metrics))
            self.http[name] = httpx2.AsyncClient(transport=transport, base_url="http://quire.test")

    async def gather(self) -> list[IngressSamples]:
        if self.gone:
            raise TimeoutError("an ingress does not answer")
        return [metrics.own_samples() for metrics in self.metrics.values()]

    async def scaling(self) -> dict[str, ScalingTelemetry]:
        return {"tiny": SCALING}

    async def scrape(self, name: str) -> dict[str, Metric]:
        response = await self.http[name].get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain; version=")
        return {family.name: family for family in text_string_to_metric_families(response.text)}


async def ask(http: httpx2.AsyncClient, count: int = 1, **fields: Any) -> None:
    for _ in range(count):
        response = await http.post("/v1/chat/completions", json=chat(**fields))
        assert response.status_code == 200
