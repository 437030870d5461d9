"""The whole application's metrics, whichever of its ingresses is asked.

Replicas tell every ingress what they count, so each ingress knows all of them. What the ingresses count themselves is
gathered when somebody asks, by a call to all of them: it is as fresh as the ingress's own, costs nothing between two
scrapes, and needs neither a mesh of links nor a store that keeps what the dead had counted. Each ingress's series carry
its name rather than being added up here: a sum over processes falls when one of them ends, which Prometheus would take
for a restart of all; `sum by (...) (rate(...))` over named series is right.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol

from app.telemetry import metrics
from app.telemetry.ingress_metrics import IngressMetrics
from app.telemetry.model_samples import (
    ModelTelemetry,
    ScalingTelemetry,
    replica_samples,
    routing_samples,
    scaling_samples,
)
from app.telemetry.samples import Exposition, MetricSample, expose, sample, with_label
from app.telemetry.usage_samples import usage_samples
from app.usage.writer import UsageStats

logger = logging.getLogger("ray.serve")

# Ingress's name → its samples.
IngressSamples = Mapping[str, list[MetricSample]]


class TelemetryModel(Protocol):
    """The part of a served model that telemetry uses."""

    @property
    def id(self) -> str:
        """What users call it."""
        ...

    def telemetry(self) -> ModelTelemetry:
        """What is known of it now."""
        ...


class ApplicationMetrics:
    """One ingress's numbers, its replicas', and on request those of the other ingresses. On its event loop.

    Args:
        ingress_id: names this ingress among the application's.
        models: those that are served now.
        gather: asks all ingresses, this one included or not, for their `own_samples`; an application of one has none.
        scaling: asks the cluster how many replicas each model is to have and has; none without a cluster.
        usage: of this ingress's usage ledger, if it keeps one.
    """

    def __init__(
        self,
        ingress_id: str,
        models: Callable[[], Iterable[TelemetryModel]],
        gather: Callable[[], Awaitable[Iterable[IngressSamples]]] | None = None,
        scaling: Callable[[], Awaitable[Mapping[str, ScalingTelemetry]]] | None = None,
        usage: UsageStats | None = None,
    ) -> None:
        self.ingress_id = ingress_id
        self.own = IngressMetrics()
        self._models = models
        self._gather = gather
        self._scaling = scaling
        self._usage = usage

    def own_samples(self) -> IngressSamples:
        """What this ingress has counted, under its name."""
        samples = self.own.samples()
        for model in self._models():
            samples += routing_samples(model.id, model.telemetry())
        if self._usage is not None:
            samples += usage_samples(self._usage)
        return {self.ingress_id: samples}

    def replica_samples(self) -> list[MetricSample]:
        """What the replicas have told this ingress, as they tell every other."""
        return [item for model in self._models() for item in replica_samples(model.id, model.telemetry())]

    async def exposed(self, accept: str = "") -> Exposition:
        """The application's metrics in the format that `accept`, a header, asks for: Prometheus' text, or OpenMetrics.

        An ingress that does not answer is left out, which `quire_ingresses` shows.
        """
        by_ingress, scaling = await asyncio.gather(self._by_ingress(), self._scaling_samples())
        samples = [sample(metrics.INGRESSES, len(by_ingress)), *self.replica_samples(), *scaling]
        for ingress_id in sorted(by_ingress):
            samples += with_label(by_ingress[ingress_id], "ingress", ingress_id)
        return expose(samples, accept)

    async def _by_ingress(self) -> dict[str, list[MetricSample]]:
        by_ingress = dict(self.own_samples())
        if self._gather is not None:
            try:
                for others in await self._gather():
                    for ingress_id, samples in others.items():
                        by_ingress.setdefault(ingress_id, samples)
            except Exception as error:
                logger.warning("the metrics of the other ingresses are missing: %s", error)
        return by_ingress

    async def _scaling_samples(self) -> list[MetricSample]:
        if self._scaling is None:
            return []
        told = await self._scaling()
        return [item for model_id in sorted(told) for item in scaling_samples(model_id, told[model_id])]
