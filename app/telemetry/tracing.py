"""OpenTelemetry in one process: which requests are traced, and where their spans go, by the standard environment.

Spans are handed over finished. The SDK's own tracer makes a live object of each span, with a lock and bounded
containers, which takes six times as long; Quire knows a span's times when it is over, and most spans of a request at
once. Sampler, id generator, resource, batch processor and exporters are the SDK's.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from opentelemetry import trace
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
    OTEL_SDK_DISABLED,
    OTEL_TRACES_SAMPLER,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import Decision, ParentBasedTraceIdRatio, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from app.version import version
from engine.errors import ConfigError

Attributes = Mapping[str, AttributeValue]

# The SDK leaves this one to its automatic configuration, which Quire does without.
OTEL_TRACES_EXPORTER = "OTEL_TRACES_EXPORTER"
CAPTURE_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_DEFAULT_PROTOCOL = "http/protobuf"
# Of the requests whose client says nothing, the share that is traced unless the environment names a sampler: each one's
# eleven spans cost some percent of the CPU time of the tokens that it is answered with.
DEFAULT_RATIO = 0.1
# A collector that does not answer must not hold up the end of a process.
_CLOSE_TIMEOUT_S = 5.0

_PROPAGATOR = TraceContextTextMapPropagator()
_UNSET = Status(StatusCode.UNSET)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class SpanEvent(NamedTuple):
    """Something that happened within a span, at a time in nanoseconds since the epoch."""

    name: str
    at_ns: int
    attributes: Attributes


class SampledSpan(NamedTuple):
    """A span that will be exported: its own context, and its parent's, None for the root of a trace."""

    context: SpanContext
    parent: SpanContext | None


class HashedResource(Resource):
    """A resource that knows its hash: exporters ask for it with every span, and the SDK's then writes JSON."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


class Tracing:
    """Where this process' spans go. Any thread may call it; no call waits for the exporter.

    The exporter works on a thread of its own behind a bounded queue: spans that it cannot get rid of are dropped.

    Args:
        exporter: closed with this.
        captures_content: whether prompts and answers may be written into spans.
        sampler: None is what the environment names, or all.

    Attributes:
        max_text_length: characters of such a text at most; None is no bound.
    """

    def __init__(
        self,
        exporter: SpanExporter,
        resource: Resource | None = None,
        *,
        captures_content: bool = False,
        sampler: Sampler | None = None,
    ) -> None:
        self.captures_content = captures_content
        # OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT: texts are the only values that can be long.
        self.max_text_length = SpanLimits().max_span_attribute_length
        # It reads the sampler's variables, and closes itself at exit.
        self._provider = TracerProvider(sampler, resource)
        self._resource = HashedResource(self._provider.resource)
        self._processor = BatchSpanProcessor(exporter)
        self._provider.add_span_processor(self._processor)
        self._scope = InstrumentationScope("quire", version(), Schemas.V1_42_0.value)

    @property
    def resource(self) -> Resource:
        """What its spans say of this process."""
        return self._resource

    def begin(
        self, carrier: Mapping[str, str], name: str, kind: SpanKind, attributes: Attributes
    ) -> SampledSpan | None:
        """A span for a request that arrives with these headers; None if the sampler does not want it.

        Args:
            carrier: `traceparent` and `tracestate`, if there are any.
        """
        context = _PROPAGATOR.extract(carrier)
        parent = trace.get_current_span(context).get_span_context()
        ids = self._provider.id_generator
        trace_id = parent.trace_id if parent.is_valid else ids.generate_trace_id()
        result = self._provider.sampler.should_sample(context, trace_id, name, kind, attributes)
        if result.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        own = SpanContext(trace_id, ids.generate_span_id(), False, _SAMPLED, result.trace_state)
        return SampledSpan(own, parent if parent.is_valid else None)

    def continue_from(self, carrier: Mapping[str, str]) -> SampledSpan | None:
        """A span below one that another process of Quire has sampled; None if the carrier names none."""
        parent = trace.get_current_span(_PROPAGATOR.extract(carrier)).get_span_context()
        return self.child_of(parent) if parent.is_valid and parent.trace_flags.sampled else None

    def child_of(self, parent: SpanContext) -> SampledSpan:
        """A span below `parent`."""
        span_id = self._provider.id_generator.generate_span_id()
        return SampledSpan(SpanContext(parent.trace_id, span_id, False, _SAMPLED, parent.trace_state), parent)

    def export(
        self,
        span: SampledSpan,
        name: str,
        began_ns: int,
        ended_ns: int,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        events: Sequence[SpanEvent] = (),
        error: str | None = None,
    ) -> None:
        """Hand over a finished span. Times are nanoseconds since the epoch; `error` is why it failed, if it did."""
        self._processor.on_end(
            ReadableSpan(
                name,
                span.context,
                span.parent,
                self._resource,
                attributes,
                [Event(event.name, event.attributes, event.at_ns) for event in events],
                (),
                kind,
                status=_UNSET if error is None else Status(StatusCode.ERROR, error),
                start_time=began_ns,
                end_time=max(began_ns, ended_ns),
                instrumentation_scope=self._scope,
            )
        )

    def flush(self) -> None:
        """Export what waits. Takes as long as the exporter does."""
        self._processor.force_flush()

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Export what waits, for a few seconds at most, and end. Idempotent."""
        closing = threading.Thread(target=self._provider.shutdown, name="close-tracing", daemon=True)
        closing.start()
        closing.join(timeout_s)


def carrier_of(context: SpanContext) -> dict[str, str]:
    """The W3C headers that name a span as parent."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(trace.NonRecordingSpan(context)))
    return carrier


def trace_id_of(carrier: Mapping[str, str] | None) -> str:
    """The trace's id in W3C headers, 32 hex digits; empty if they name none."""
    if not carrier:
        return ""
    context = trace.get_current_span(_PROPAGATOR.extract(carrier)).get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def now_ns() -> int:
    """The clock of all spans."""
    return time.time_ns()


def tracing_from_environment(component: str, instance_id: str, attributes: Attributes | None = None) -> Tracing | None:
    """What the OTEL_ variables ask for: None unless an OTLP endpoint is set.

    Args:
        component: `ingress` or `engine`: the service's name is `quire-` and this, unless the environment names it.
        instance_id: of this process: the id of its replica.
        attributes: further ones of the resource.

    Raises:
        ConfigError: the exporter or the protocol asked for is not there.
    """
    environ = os.environ
    endpoint = environ.get(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) or environ.get(OTEL_EXPORTER_OTLP_ENDPOINT)
    if not endpoint or environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true":
        return None
    wanted = environ.get(OTEL_TRACES_EXPORTER, "").strip().lower() or "otlp"
    if wanted == "none":
        return None
    if wanted != "otlp":
        raise ConfigError(f"{OTEL_TRACES_EXPORTER}={wanted!r} must be 'otlp' or 'none'")
    sampler = None if environ.get(OTEL_TRACES_SAMPLER, "").strip() else ParentBasedTraceIdRatio(DEFAULT_RATIO)
    resource = _resource(component, instance_id, attributes or {})
    return Tracing(_otlp_exporter(), resource, captures_content=_captures(), sampler=sampler)


def _otlp_exporter() -> SpanExporter:
    """By the protocol that the environment names; the rest of its variables the exporters read themselves."""
    environ = os.environ
    name = OTEL_EXPORTER_OTLP_TRACES_PROTOCOL if environ.get(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL) else None
    name = name or OTEL_EXPORTER_OTLP_PROTOCOL
    protocol = environ.get(name, "").strip().lower() or _DEFAULT_PROTOCOL
    # Imported only when used: each brings an HTTP or a gRPC client.
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    if protocol == _DEFAULT_PROTOCOL:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter()
    raise ConfigError(f"{name}={protocol!r} must be 'grpc' or '{_DEFAULT_PROTOCOL}'")


def _resource(component: str, instance_id: str, attributes: Attributes) -> Resource:
    own = {
        "service.name": f"quire-{component}",
        "service.namespace": "quire",
        "service.version": version(),
        "service.instance.id": instance_id,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        **attributes,
    }
    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES have the last word.
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _captures() -> bool:
    return os.environ.get(CAPTURE_VARIABLE, "").strip().lower() in ("true", "span_only", "span_and_event")
