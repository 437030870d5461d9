"""Samples as they travel between processes, and the text that Prometheus reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import exposition
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from app.telemetry.metrics import ALL_METRICS, MetricDefinition

CONTENT_TYPE = exposition.CONTENT_TYPE_PLAIN_0_0_4


class MetricSample(NamedTuple):
    """One number of the metric `family`. `name` is longer than it in a histogram: `_bucket`, `_sum`, `_count`."""

    family: str
    name: str
    labels: Mapping[str, str]
    value: float


def sample(metric: MetricDefinition, value: float, *labels: str) -> MetricSample:
    """A counter's or gauge's number; `labels` in the order of its definition."""
    return MetricSample(metric.name, metric.name, dict(zip(metric.labels, labels, strict=True)), value)


def collect_samples(registry: CollectorRegistry) -> list[MetricSample]:
    """All numbers of a process. Creation times are left out: Prometheus' text format has none."""
    families = {family.name.removesuffix("_total"): family for family in ALL_METRICS}
    return [
        MetricSample(families[metric.name].name, item.name, item.labels, item.value)
        for metric in registry.collect()
        for item in metric.samples
        if not item.name.endswith("_created")
    ]


def with_label(samples: Iterable[MetricSample], name: str, value: str) -> list[MetricSample]:
    """The samples with one label more."""
    return [item._replace(labels={**item.labels, name: value}) for item in samples]


def exposition_text(samples: Iterable[MetricSample]) -> bytes:
    """Prometheus' text format; the metrics in the table's order, those without a sample left out.

    Samples of metrics that are not in the table, as another version's process may send, are left out too.
    """
    by_family: dict[str, list[MetricSample]] = defaultdict(list)
    for item in samples:
        by_family[item.family].append(item)
    return exposition.generate_latest(_Collected(by_family))


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
                    metric.add_sample(item.name, dict(item.labels), item.value)
                yield metric
