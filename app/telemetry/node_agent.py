"""What a process counts, handed to Ray's agent on its node, which exports it as `ray_quire_...` to whoever scrapes it.

The same samples as `/metrics` has of this process, read at an interval and told to `ray.util.metrics` as that wants
them: gauges again each time, as they vanish otherwise; of counters what has come since; of a histogram as many
observations as each bucket has got, at its middle, which is what Ray's agent makes of observations anyway: buckets
and counts are right, the sum is an approximation.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from app.telemetry.metrics import ALL_METRICS, MetricDefinition
from app.telemetry.samples import MetricSample

logger = logging.getLogger(__name__)

DEFAULT_INTERVAL_S = 10.0

Labels = Mapping[str, str]


class RayMetrics(Protocol):
    """ray.util.metrics, or what a test has in its place."""

    def set_gauge(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        """A gauge is so much now."""
        ...

    def add(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        """A counter has grown by so much, which is above 0."""
        ...

    def observe(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        """A histogram gets an observation."""
        ...


class NodeAgentExport:
    """Exports a process' samples at an interval, on a thread of its own.

    Args:
        read: the samples now; called on that thread.
        metrics: where they go; None is Ray's agent, for which this process must be a worker of Ray's.
    """

    def __init__(
        self, read: Callable[[], Iterable[MetricSample]], interval_s: float, metrics: RayMetrics | None = None
    ) -> None:
        self._read = read
        self._interval_s = interval_s
        self._metrics = metrics or NodeAgent()
        self._definitions = {definition.name: definition for definition in ALL_METRICS}
        # By a sample's name and labels: what has been told of it.
        self._told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="node-agent-export", daemon=True)

    def start(self) -> None:
        """Export from now on, until `close`."""
        self._thread.start()

    def close(self) -> None:
        """Export no more; what came since the last time is not told."""
        self._stopping.set()

    def export(self, samples: Iterable[MetricSample]) -> None:
        """Tell these samples. Those of metrics that are not in the table are left out."""
        buckets: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[float, float]]] = {}
        for item in samples:
            metric = self._definitions.get(item.family)
            if metric is None:
                continue
            if metric.type == "gauge":
                self._metrics.set_gauge(metric, item.value, item.labels)
            elif metric.type == "counter":
                if (grown := self._grown(item.name, item.labels, item.value)) > 0:
                    self._metrics.add(metric, grown, item.labels)
            elif item.name.endswith("_bucket"):
                labels = tuple((name, value) for name, value in item.labels.items() if name != "le")
                buckets.setdefault((metric.name, labels), []).append((float(item.labels["le"]), item.value))
        for (name, labels), counts in buckets.items():
            self._observe(self._definitions[name], dict(labels), sorted(counts))

    def _observe(self, metric: MetricDefinition, labels: Labels, counts: list[tuple[float, float]]) -> None:
        """Observe what a histogram's buckets, each of which includes those before it, have grown by."""
        below = 0.0
        before = 0.0
        for bound, count in counts:
            grown = self._grown(f"{metric.name}<={bound}", labels, count)
            middle = 2.0 * before if math.isinf(bound) else (before + bound) / 2.0
            for _ in range(round(grown - below)):
                self._metrics.observe(metric, middle, labels)
            below, before = grown, bound

    def _grown(self, name: str, labels: Labels, value: float) -> float:
        key = (name, tuple(labels.items()))
        grown = value - self._told.get(key, 0.0)
        self._told[key] = value
        return grown

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self.export(self._read())
                self._failing = False
            except Exception as error:
                if not self._failing:
                    logger.warning("metrics do not reach Ray's agent: %s; said once", error)
                self._failing = True


class NodeAgent:
    """RayMetrics over ray.util.metrics. A metric is made when it is first told of."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._ray = metrics
        self._gauges: dict[str, metrics.Gauge] = {}
        self._counters: dict[str, metrics.Counter] = {}
        self._histograms: dict[str, metrics.Histogram] = {}

    def set_gauge(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        gauge = self._gauges.get(metric.name)
        if gauge is None:
            gauge = self._gauges[metric.name] = self._ray.Gauge(metric.name, metric.help, tuple(labels))
        gauge.set(value, dict(labels))

    def add(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        counter = self._counters.get(metric.name)
        if counter is None:
            # Prometheus' suffix is the agent's to give.
            name = metric.name.removesuffix("_total")
            counter = self._counters[metric.name] = self._ray.Counter(name, metric.help, tuple(labels))
        counter.inc(value, dict(labels))

    def observe(self, metric: MetricDefinition, value: float, labels: Labels) -> None:
        histogram = self._histograms.get(metric.name)
        if histogram is None:
            histogram = self._ray.Histogram(metric.name, metric.help, list(metric.buckets), tuple(labels))
            self._histograms[metric.name] = histogram
        histogram.observe(value, dict(labels))
