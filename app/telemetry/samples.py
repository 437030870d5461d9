"""Samples as they travel between processes, and the text that Prometheus reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import exposition
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Exemplar

from app.telemetry.metrics import ALL_METRICS, MetricDefinition


class Exposition(NamedTuple):
    """`/metrics` in the format that was asked for."""

    content: bytes
    content_type: str


class MetricSample(NamedTuple):
    """One number of the metric `family`. `name` is longer than it in a histogram: `_bucket`, `_sum`, `_count`.

    `exemplar` is of a bucket: the last request in it that was traced.
    """

    family: str
    name: str
    labels: Mapping[str, str]
    value: float
    exemplar: Exemplar | None = None


def sample(metric: MetricDefinition, value: float, *labels: str) -> MetricSample:
    """A counter's or gauge's number; `labels` in the order of its definition."""
    return MetricSample(metric.name, metric.name, dict(zip(metric.labels, labels, strict=True)), value)


def collect_samples(registry: CollectorRegistry) -> list[MetricSample]:
    """All numbers of a process. Creation times are left out: Prometheus' text format has none."""
    families = {family.name.removesuffix("_total"): family for family in ALL_METRICS}
    return [
        MetricSample(families[metric.name].name, item.name, item.labels, item.value, item.exemplar)
        for metric in registry.collect()
        for item in metric.samples
        if not item.name.endswith("_created")
    ]


def with_label(samples: Iterable[MetricSample], name: str, value: str) -> list[MetricSample]:
    """The samples with one label more."""
    return [item._replace(labels={**item.labels, name: value}) for item in samples]


def expose(samples: Iterable[MetricSample], accept: str = "") -> Exposition:
    """Prometheus' text format, or OpenMetrics for whoever accepts that, which alone has exemplars.

    The metrics in the table's order, those without a sample left out. Samples of metrics that are not in the table, as
    another version's process may send, are left out too.

    Args:
        accept: the request's header of that name.
    """
    by_family: dict[str, list[MetricSample]] = defaultdict(list)
    for item in samples:
        by_family[item.family].append(item)
    encode, content_type = exposition.choose_encoder(accept)
    return Exposition(encode(_Collected(by_family)), content_type)


class _Collected(Collector):
    """What generate_latest asks of a registry."""

    def __init__(self, by_family: Mapping[str, list[MetricSample]]) -> None:
        self._by_family = by_family

    def collect(self) -> Iterator[Metric]:
        for definition in ALL_METRICS:
            found = self._by_family.get(definition.name)
            if found:
                metric = Metric(definition.name.removesuffix("_total"), definition.help, definition.type)
                for item in found:
                    metric.add_sample(item.name, dict(item.labels), item.value, exemplar=item.exemplar)
                yield metric
