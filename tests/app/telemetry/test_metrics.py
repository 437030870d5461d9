"""The table keeps Prometheus' conventions, and its labels are those that it bounds."""

from __future__ import annotations

import re

import pytest

from app.telemetry import metrics
from app.telemetry.metrics import ALL_METRICS, MetricDefinition

UNITS = ("seconds", "bytes", "tokens", "slots", "requests", "bookings", "replicas", "ingresses", "steps")
UNITLESS_COUNTS = (
    "refused",
    "adapters",
    "loads",
    "evictions",
    "failures",
    "decisions",
    "resubmissions",
    "routes",
    "preemptions",
    "open",
    "admitted",
    "records",
    "errors",
)
LABELS = {
    "model",
    "replica",
    "endpoint",
    "code",
    "outcome",
    "kind",
    "state",
    "phase",
    "class",
    "reason",
    "direction",
    "cause",
    "operation",
}


def faults(metric: MetricDefinition) -> list[str]:
    """What Prometheus' naming guide would say."""
    name = metric.name
    found = []
    if not re.fullmatch(r"quire_[a-z]+(_[a-z]+)*", name):
        found.append("snake case with the application's prefix")
    if name.endswith("_total") != (metric.type == "counter"):
        found.append("counters, and only they, end in _total")
    unit = name.removesuffix("_total").rpartition("_")[2]
    if unit not in UNITS + UNITLESS_COUNTS:
        found.append(f"{unit} is neither a base unit nor a thing that is counted")
    if metric.type == "histogram" and unit != "seconds":
        found.append("histograms are of seconds")
    if bool(metric.buckets) != (metric.type == "histogram") or list(metric.buckets) != sorted(set(metric.buckets)):
        found.append("buckets rise, and only histograms have them")
    if not set(metric.labels) <= LABELS:
        found.append("a label that nothing bounds")
    if not metric.help.endswith("."):
        found.append("help is a sentence")
    return found


@pytest.mark.parametrize("metric", ALL_METRICS, ids=lambda metric: metric.name)
def test_names_units_and_labels_follow_the_conventions(metric: MetricDefinition) -> None:
    assert faults(metric) == []


def test_every_metric_that_is_defined_is_exposed() -> None:
    defined = {value for value in vars(metrics).values() if isinstance(value, MetricDefinition)}
    assert defined == set(ALL_METRICS)


def test_names_are_unique() -> None:
    assert len({metric.name for metric in ALL_METRICS}) == len(ALL_METRICS)


@pytest.mark.parametrize(
    "metric",
    [
        MetricDefinition("quire_requests", "counter", "Requests.", ("model",)),
        MetricDefinition("quire_wait_milliseconds", "gauge", "Wait.", ("model",)),
        MetricDefinition("quire_requests_total", "counter", "Requests.", ("user",)),
        MetricDefinition("quire_wait_seconds", "histogram", "Wait.", ("model",), (2.0, 1.0)),
    ],
    ids=["no total", "no base unit", "unbounded label", "falling buckets"],
)
def test_a_fault_is_found(metric: MetricDefinition) -> None:
    assert len(faults(metric)) == 1
