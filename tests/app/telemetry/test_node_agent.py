"""What Ray's agent is told, with Ray's metrics taken down instead; tests/app/test_tracing.py has a real agent."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

import pytest

from app.telemetry import metrics
from app.telemetry.ingress_metrics import IngressMetrics
from app.telemetry.metrics import MetricDefinition
from app.telemetry.node_agent import NodeAgentExport
from app.telemetry.samples import MetricSample, sample, with_label

Told = tuple[str, str, float, dict[str, str]]


class Recorder:
    """Takes down what is told."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def set_gauge(self, metric: MetricDefinition, value: float, labels: Mapping[str, str]) -> None:
        self.told.append(("set", metric.name, value, dict(labels)))

    def add(self, metric: MetricDefinition, value: float, labels: Mapping[str, str]) -> None:
        self.told.append(("add", metric.name, value, dict(labels)))

    def observe(self, metric: MetricDefinition, value: float, labels: Mapping[str, str]) -> None:
        self.told.append(("observe", metric.name, value, dict(labels)))

    def take(self) -> list[Told]:
        told, self.told = self.told, []
        return told


def made(read: Callable[[], list[MetricSample]] = list, interval_s: float = 60.0) -> tuple[NodeAgentExport, Recorder]:
    recorder = Recorder()
    return NodeAgentExport(read, interval_s, recorder), recorder


def test_gauges_are_told_each_time_and_counters_what_has_come() -> None:
    export, recorder = made()
    labels = {"model": "tiny"}
    for tokens, told in ((0, []), (7, [7]), (7, []), (10, [3])):
        export.export([sample(metrics.OPEN_REQUESTS, 2, "tiny"), sample(metrics.PROMPT_TOKENS, tokens, "tiny")])
        assert recorder.take() == [
            ("set", "quire_requests_open", 2, labels),
            *(("add", "quire_prompt_tokens_total", value, labels) for value in told),
        ]


def test_series_are_told_apart_by_their_labels() -> None:
    export, recorder = made()
    for tokens in (5, 6):
        export.export([sample(metrics.PROMPT_TOKENS, tokens, name) for name in ("tiny", "small")])
    assert [(value, labels["model"]) for _, _, value, labels in recorder.take()] == [
        *((5, "tiny"), (5, "small"), (1, "tiny"), (1, "small"))
    ]


def test_a_histogram_comes_as_observations_in_the_same_buckets() -> None:
    own = IngressMetrics()
    histogram = own.request_duration.labels("tiny", "default")
    export, recorder = made()
    copy = IngressMetrics()
    for values in ((0.01, 0.011, 0.3), (), (1e6, 599.0, 0.0)):
        for value in values:
            histogram.observe(value)
        export.export(with_label(own.samples(), "ingress", "one"))
        told = [each for each in recorder.take() if each[0] == "observe"]
        assert len(told) == len(values)
        for _, name, value, labels in told:
            assert (name, labels["ingress"]) == ("quire_request_duration_seconds", "one")
            copy.request_duration.labels(labels["model"], labels["class"]).observe(value)
    buckets = [
        [(item.labels["le"], item.value) for item in each.samples() if item.name.endswith("duration_seconds_bucket")]
        for each in (own, copy)
    ]
    assert buckets[0] == buckets[1]
    assert buckets[0][-1] == ("+Inf", 6)


def test_what_is_not_in_the_table_is_left_out() -> None:
    export, recorder = made()
    export.export([MetricSample("quire_of_tomorrow", "quire_of_tomorrow", {}, 1.0)])
    assert recorder.take() == []


def test_it_goes_on_after_a_failure_which_it_says_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    num_reads = 0

    def read() -> list[MetricSample]:
        nonlocal num_reads
        num_reads += 1
        if num_reads <= 3:
            raise TimeoutError("the loop is busy")
        return [sample(metrics.OPEN_REQUESTS, 2, "tiny")]

    export, recorder = made(read, 0.001)
    export.start()
    deadline = time.monotonic() + 60
    while not recorder.told:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    export.close()
    assert caplog.text.count("metrics do not reach Ray's agent: the loop is busy") == 1
