from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from app.telemetry.tracing import SpanEvent, Tracing, carrier_of, now_ns, tracing_from_environment
from engine.errors import ConfigError
from tests.app.telemetry.collected import Collected, attributes_of
from tests.app.telemetry.otlp_receiver import receiving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME")
    for name in (*names, "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)


def begin(tracing: Tracing, **carrier: str) -> object:
    return tracing.begin(carrier, "POST /", SpanKind.SERVER, {})


def test_a_trace_begins_here_or_goes_on_from_the_client() -> None:
    collected = Collected()
    tracing = collected.tracing
    own = tracing.begin({}, "POST /", SpanKind.SERVER, {})
    assert own is not None
    assert own.parent is None
    state = "vendor=1"
    given = tracing.begin({"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": state}, "x", SpanKind.SERVER, {})
    assert given is not None
    assert given.parent is not None
    assert f"{given.context.trace_id:032x}" == TRACE != f"{own.context.trace_id:032x}"
    assert f"{given.parent.span_id:016x}" == PARENT
    assert given.parent.is_remote
    carrier = carrier_of(given.context)
    assert carrier == {"traceparent": f"00-{TRACE}-{given.context.span_id:016x}-01", "tracestate": state}
    below = tracing.continue_from(carrier)
    assert below is not None
    assert below.parent is not None
    assert below.parent.span_id == given.context.span_id
    assert below.context.trace_id == given.context.trace_id


@pytest.mark.parametrize("header", ["", "rubbish", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"])
def test_a_malformed_header_begins_a_trace_of_its_own(header: str) -> None:
    tracing = Collected().tracing
    span = tracing.begin({"traceparent": header}, "x", SpanKind.SERVER, {})
    assert span is not None
    assert span.parent is None
    assert tracing.continue_from({"traceparent": header}) is None


def test_the_clients_decision_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert begin(Collected().tracing, traceparent=f"00-{TRACE}-{PARENT}-00") is None
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracing = Collected().tracing
    assert begin(tracing) is None
    assert begin(tracing, traceparent=f"00-{TRACE}-{PARENT}-01") is not None
    assert tracing.continue_from({"traceparent": f"00-{TRACE}-{PARENT}-00"}) is None


def test_a_ratio_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    tracing = Collected().tracing
    sampled = sum(begin(tracing) is not None for _ in range(2000))
    assert 400 < sampled < 600


@pytest.mark.parametrize(("sampler", "least", "most"), [(None, 130, 280), ("parentbased_always_on", 2000, 2000)])
def test_one_request_of_ten_unless_the_environment_names_a_sampler(
    monkeypatch: pytest.MonkeyPatch, sampler: str | None, least: int, most: int
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    if sampler is not None:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    tracing = tracing_from_environment("ingress", "r1")
    assert tracing is not None
    assert least <= sum(begin(tracing) is not None for _ in range(2000)) <= most
    sampled = begin(tracing, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert sampled is not None, "a client that traces has decided"
    tracing.close()


def test_a_span_says_what_it_was_told() -> None:
    collected = Collected()
    span = collected.tracing.begin({}, "x", SpanKind.SERVER, {})
    assert span is not None
    event = SpanEvent("decision", 15, {"cost": 0.5})
    collected.tracing.export(span, "work", 10, 20, {"a": 1}, kind=SpanKind.CLIENT, events=[event], error="no luck")
    done = collected.named("work")
    assert (done.start_time, done.end_time, done.kind) == (10, 20, SpanKind.CLIENT)
    assert attributes_of(done) == {"a": 1}
    assert [(item.name, item.timestamp, dict(item.attributes or {})) for item in done.events] == [
        ("decision", 15, {"cost": 0.5})
    ]
    assert (done.status.is_ok, done.status.description) == (False, "no luck")
    assert done.instrumentation_scope is not None
    assert done.instrumentation_scope.name == "quire"


def test_off_unless_an_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing_from_environment("engine", "r1") is None
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_from_environment("engine", "r1") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert tracing_from_environment("engine", "r1") is None


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"), ("OTEL_TRACES_EXPORTER", "zipkin")]
)
def test_what_is_not_there_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}' must be"):
        tracing_from_environment("engine", "r1")


@pytest.mark.parametrize(
    ("protocol", "exporter"), [(None, HttpExporter), ("http/protobuf", HttpExporter), ("grpc", GrpcExporter)]
)
def test_the_protocol_chooses_the_exporter(
    monkeypatch: pytest.MonkeyPatch, protocol: str | None, exporter: type[SpanExporter]
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    if protocol is not None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    tracing = tracing_from_environment("engine", "r1", {"quire.model": "m"})
    assert tracing is not None
    assert isinstance(tracing._processor.span_exporter, exporter)
    attributes = tracing.resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("quire-engine", "r1")
    assert attributes["quire.model"] == "m"
    assert not tracing.captures_content
    tracing.close()


def test_the_environment_names_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test,service.namespace=ours")
    tracing = tracing_from_environment("ingress", "r1")
    assert tracing is not None
    attributes = tracing.resource.attributes
    assert attributes["service.name"] == "chat"
    assert (attributes["deployment.environment.name"], attributes["service.namespace"]) == ("test", "ours")
    tracing.close()


class Stuck(SpanExporter):
    """A collector that does not answer until it is let go."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.num_exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.released.wait(30)
        self.num_exported += len(spans)
        return SpanExportResult.SUCCESS


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    exporter = Stuck()
    yield exporter
    exporter.released.set()


def test_a_collector_that_hangs_costs_spans_and_nothing_else(stuck: Stuck) -> None:
    tracing = Tracing(stuck)
    began = time.monotonic()
    for _ in range(1000):
        span = tracing.begin({}, "x", SpanKind.SERVER, {})
        assert span is not None
        tracing.export(span, "x", now_ns(), now_ns(), {})
    assert time.monotonic() - began < 2.0, "nobody waits for the exporter"
    tracing.close(timeout_s=0.2)
    assert time.monotonic() - began < 4.0, "nor does the end of the process"
    stuck.released.set()
    assert stuck.num_exported < 100


def test_what_waits_is_exported_at_the_end() -> None:
    collected = Collected()
    for _ in range(5):
        span = collected.tracing.begin({}, "x", SpanKind.SERVER, {})
        assert span is not None
        collected.tracing.export(span, "x", 1, 2, {})
    collected.tracing.close()
    collected.tracing.close()
    assert len(collected._exporter.get_finished_spans()) == 5


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_reach_an_otlp_receiver(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
        monkeypatch.setenv(ENDPOINT, receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        tracing = tracing_from_environment("ingress", "r1")
        assert tracing is not None
        root = tracing.begin({}, "x", SpanKind.SERVER, {})
        assert root is not None
        child = tracing.child_of(root.context)
        tracing.export(
            child, "child", 10, 20, {"tokens": 3, "reasons": ["stop"]}, events=[SpanEvent("e", 15, {"c": 0.5})]
        )
        tracing.export(root, "root", 5, 30, {}, kind=SpanKind.SERVER, error="no luck")
        tracing.close()
        below, above = receiver.trace(f"{root.context.trace_id:032x}")[::-1]
    assert {below.protocol, above.protocol} == {protocol.partition("/")[0]}
    assert above.resource["service.name"] == "quire-ingress"
    assert (above.name, above.kind, above.parent_id, above.error) == ("root", "server", "", "no luck")
    assert (below.name, below.kind, below.parent_id, below.error) == ("child", "internal", above.span_id, None)
    assert (below.began_ns, below.ended_ns) == (10, 20)
    assert below.attributes == {"tokens": 3, "reasons": ["stop"]}
    assert below.events == [("e", {"c": 0.5})]
