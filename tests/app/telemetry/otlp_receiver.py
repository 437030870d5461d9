"""An OTLP receiver on the official proto package: gRPC and HTTP on ports of this machine, spans kept in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.http_server import Handler, serving_http


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came; ids in hex, `parent_id` empty for a root; `protocol` is the way that it came."""

    protocol: str
    resource: dict[str, Any]
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    error: str | None

    @property
    def duration_s(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


class Receiver:
    """Keeps what comes. Any thread."""

    def __init__(self) -> None:
        self.http_endpoint = ""
        self.grpc_endpoint = ""
        self._lock = threading.Lock()
        self._spans: list[ReceivedSpan] = []

    @property
    def spans(self) -> list[ReceivedSpan]:
        with self._lock:
            return list(self._spans)

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        """The spans of a trace, in the order of their starts."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began_ns)

    def await_spans(self, condition: Callable[[list[ReceivedSpan]], bool], timeout_s: float = 20.0) -> None:
        """Wait until what has come is enough."""
        deadline = time.monotonic() + timeout_s
        while not condition(self.spans):
            assert time.monotonic() < deadline, f"not all spans came: {[span.name for span in self.spans]}"
            time.sleep(0.05)

    def take(self, protocol: str, request: ExportTraceServiceRequest) -> None:
        """One export."""
        received = [
            _received(protocol, _values(group.resource.attributes), span)
            for group in request.resource_spans
            for scope in group.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += received


def _received(protocol: str, resource: dict[str, Any], span: Span) -> ReceivedSpan:
    return ReceivedSpan(
        protocol,
        resource,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        [(event.name, _values(event.attributes)) for event in span.events],
        span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
    )


def _values(attributes: Any) -> dict[str, Any]:
    pairs: list[KeyValue] = list(attributes)
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    assert kind is not None
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver that listens until the body ends."""
    receiver = Receiver()

    class Traces(Handler):
        def do_POST(self) -> None:  # noqa: N802  # the name is http.server's
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.take("http", ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    class Servicer(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, _: object) -> ExportTraceServiceResponse:  # noqa: N802
            receiver.take("grpc", request)
            return ExportTraceServiceResponse()

    pool = ThreadPoolExecutor(2)
    rpc = grpc.server(pool)
    add_TraceServiceServicer_to_server(Servicer(), rpc)  # type: ignore[no-untyped-call]
    receiver.grpc_endpoint = f"http://127.0.0.1:{rpc.add_insecure_port('127.0.0.1:0')}"
    rpc.start()
    try:
        with serving_http(Traces) as receiver.http_endpoint:
            yield receiver
    finally:
        rpc.stop(None).wait()
        pool.shutdown()
