"""One sampled HTTP request in an ingress: the spans that it makes there, each exported as it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from http import HTTPStatus
from types import TracebackType
from typing import Protocol, Self

from opentelemetry.trace import SpanKind, format_span_id, format_trace_id
from opentelemetry.util.types import AttributeValue

from app.telemetry import spans
from app.telemetry.ingress_metrics import CLIENT_WENT_AWAY, RequestRecord, TokenCounts
from app.telemetry.tracing import Attributes, SampledSpan, SpanEvent, Tracing, carrier_of, now_ns
from engine.sampling_params import SamplingParams

_current: ContextVar[RequestTrace | None] = ContextVar("quire_request_trace", default=None)


class RouteReceipt(Protocol):
    """What a choice of the balancer rested on; its RouteReceipt."""

    @property
    def replica_id(self) -> str: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def wait_s(self) -> float: ...
    @property
    def cost_s(self) -> float: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def adapter_s(self) -> float: ...


def current_trace() -> RequestTrace | None:
    """The trace of the HTTP request that is being served in this context, if it is sampled."""
    return _current.get()


class RequestTrace:
    """The root of a request's spans in its ingress.

    Attributes:
        attributes: of the root span; whoever learns something adds it.
        record: the same request's record for the metrics, which knows how it ended; set once there is one.
    """

    def __init__(self, tracing: Tracing, span: SampledSpan, name: str, attributes: Attributes) -> None:
        self.tracing = tracing
        self.attributes: dict[str, AttributeValue] = dict(attributes)
        self.record: RequestRecord | None = None
        self._sent_code: int | None = None
        self._span = span
        self._name = name
        self._began_ns = now_ns()
        self._usage: TokenCounts | None = None
        self._finish_reasons: dict[int, str] = {}
        self._answered: set[str] = set()
        self._texts: dict[int, list[str]] = {}

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return format_trace_id(self._span.context.trace_id)

    @property
    def span_id(self) -> str:
        """16 hex digits: of the root."""
        return format_span_id(self._span.context.span_id)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make it the trace of what runs inside."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def sent(self, code: int) -> None:
        """The answer begins with this HTTP status."""
        self._sent_code = code

    def generates(self, usage: TokenCounts, attributes: Attributes) -> None:
        """The request is sound, and goes to a model. `usage` is read at the end."""
        self._usage = usage
        self.attributes.update(attributes)

    def first_tokens(self) -> None:
        """The first tokens of one of its prompts have come."""
        elapsed_s = (now_ns() - self._began_ns) / 1e9
        self.attributes.setdefault(spans.TIME_TO_FIRST_CHUNK, elapsed_s)

    @property
    def captures_content(self) -> bool:
        """Whether its prompts and answers are wanted."""
        return self.tracing.captures_content

    def asks(self, messages: Sequence[Mapping[str, str]]) -> None:
        """What the model is asked, `role` and `content` each. Only if content is captured."""
        asked = [{"role": message["role"], "parts": [_text_part(message["content"])]} for message in messages]
        self.attributes[spans.INPUT_MESSAGES] = self._bounded(json.dumps(asked, ensure_ascii=False))

    def add_text(self, index: int, text: str) -> None:
        """More of a choice's text. Only if content is captured."""
        self._texts.setdefault(index, []).append(text)

    def answered(self, request_id: str, first_choice: int, finish_reasons: Sequence[str]) -> None:
        """One of its engine requests has all that was asked for, whatever its replica still does."""
        self._answered.add(request_id)
        self._finish_reasons.update(enumerate(finish_reasons, first_choice))

    def is_answered(self, request_id: str) -> bool:
        """Whether this engine request has all that was asked for."""
        return request_id in self._answered

    def attempt(self, request_id: str, number: int) -> AttemptTrace:
        """A submission to a replica begins."""
        return AttemptTrace(self, self.tracing.child_of(self._span.context), request_id, number)

    def child(self, name: str, began_ns: int, attributes: Attributes, *, error: str | None = None) -> None:
        """Export a span below the root that ends now."""
        span = self.tracing.child_of(self._span.context)
        self.tracing.export(span, name, began_ns, now_ns(), attributes, error=error)

    def end(self) -> None:
        """The answer has ended."""
        attributes, usage = self.attributes, self._usage
        # A stream that fails has been answered with 200.
        code = self._sent_code if self.record is None else int(self.record.code)
        if usage is not None:
            attributes[spans.INPUT_TOKENS] = usage.prompt_tokens
            attributes[spans.OUTPUT_TOKENS] = usage.completion_tokens
            attributes[spans.CACHED_INPUT_TOKENS] = usage.cached_tokens
        if self._finish_reasons:
            attributes[spans.RESPONSE_FINISH_REASONS] = [reason for _, reason in sorted(self._finish_reasons.items())]
        if self._texts:
            attributes[spans.OUTPUT_MESSAGES] = self._bounded(json.dumps(self._answers(), ensure_ascii=False))
        error = None
        if code is not None:
            attributes[spans.STATUS_CODE] = code
            if code >= HTTPStatus.BAD_REQUEST:
                attributes[spans.ERROR_TYPE] = str(code)
            error = _error_of(code)
        self.tracing.export(
            self._span, self._name, self._began_ns, now_ns(), attributes, kind=SpanKind.SERVER, error=error
        )

    def _answers(self) -> list[dict[str, object]]:
        return [
            {
                "role": "assistant",
                "parts": [_text_part("".join(pieces))],
                "finish_reason": self._finish_reasons.get(index, "error"),
            }
            for index, pieces in sorted(self._texts.items())
        ]

    def _bounded(self, text: str) -> str:
        return text[: self.tracing.max_text_length]


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "content": text}


def request_attributes(params: SamplingParams) -> Attributes:
    """What the conventions say of how tokens are drawn; what is off is left out."""
    attributes: dict[str, AttributeValue] = {spans.REQUEST_TEMPERATURE: params.temperature}
    if params.max_tokens is not None:
        attributes[spans.REQUEST_MAX_TOKENS] = params.max_tokens
    if params.n != 1:
        attributes[spans.REQUEST_CHOICES] = params.n
    if params.seed is not None:
        attributes[spans.REQUEST_SEED] = params.seed
    if params.top_p != 1.0:
        attributes[spans.REQUEST_TOP_P] = params.top_p
    if params.top_k > 0:
        attributes[spans.REQUEST_TOP_K] = params.top_k
    if params.frequency_penalty:
        attributes[spans.REQUEST_FREQUENCY_PENALTY] = params.frequency_penalty
    if params.presence_penalty:
        attributes[spans.REQUEST_PRESENCE_PENALTY] = params.presence_penalty
    return attributes


def _error_of(code: int) -> str | None:
    """What makes a request's span a failed one. A request that was wrong is its sender's failure, not the server's."""
    if code == CLIENT_WENT_AWAY:
        return "the client went away"
    if code == HTTPStatus.TOO_MANY_REQUESTS or code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return HTTPStatus(code).phrase
    return None


class AttemptTrace:
    """One submission of a request to a replica, as its ingress sees it. `placed` may come on the router's thread."""

    def __init__(self, trace: RequestTrace, span: SampledSpan, request_id: str, number: int) -> None:
        self._trace = trace
        self._tracing = trace.tracing
        self._request_id = request_id
        self._span = span
        self._began_ns = now_ns()
        self._attributes: dict[str, AttributeValue] = {
            spans.ENGINE_REQUEST_ID: request_id,
            spans.ATTEMPT_NUMBER: number,
        }
        self._events: list[SpanEvent] = []
        self._is_queued = True
        self._called_ns = 0
        self._placed_ns = 0
        self._num_refusals = 0
        self._error: str | None = None

    @property
    def carrier(self) -> dict[str, str]:
        """What its replica is told: W3C headers that name the attempt as parent."""
        return carrier_of(self._span.context)

    def decided(self, outcome: str, route: RouteReceipt | None, num_candidates: int) -> None:
        """The balancer has placed or held it, among so many replicas; `route` is what the choice rested on."""
        attributes: dict[str, AttributeValue] = {spans.OUTCOME: outcome, spans.NUM_CANDIDATES: num_candidates}
        if route is not None:
            attributes |= {
                spans.REPLICA: route.replica_id,
                spans.PREDICTED_COST: route.cost_s,
                spans.PREDICTED_WAIT: route.wait_s,
                spans.PREDICTED_PREFILL: route.prefill_s,
                spans.EXPECTED_CACHED_TOKENS: route.cached_tokens,
            }
            if route.adapter_s:
                attributes[spans.PREDICTED_ADAPTER] = route.adapter_s
        self._events.append(SpanEvent("decision", now_ns(), attributes))

    def called(self) -> None:
        """It goes out, by socket or by its call."""
        self._called_ns = now_ns()
        self._end_queue(None)

    def placed(self, replica_id: str | None, *, refused: bool) -> None:
        """It has been sent by socket, or the request router has asked where its call goes."""
        self._num_refusals += refused
        if replica_id is not None:
            self._placed_ns = now_ns()
            self._attributes[spans.REPLICA] = replica_id

    def began(self, cached_tokens: int) -> None:
        """Its first tokens have come."""
        self._attributes[spans.CACHED_INPUT_TOKENS] = cached_tokens
        self._end_route()

    def failed(self, reason: str) -> None:
        """It will end, and not with what was asked for."""
        self._error = reason

    def left(self) -> None:
        """Its reader has gone, which is no failure if it has all that it wanted."""
        if not self._trace.is_answered(self._request_id):
            self.failed("its reader has gone")

    def end(self) -> None:
        """It is over."""
        if self._is_queued:
            # Turned away, or left, before it was sent anywhere.
            self._end_queue(self._error)
        self._end_route()
        self._tracing.export(
            self._span,
            spans.ATTEMPT,
            self._began_ns,
            now_ns(),
            self._attributes,
            kind=SpanKind.CLIENT,
            error=self._error,
        )

    def _end_queue(self, error: str | None) -> None:
        self._is_queued = False
        self._tracing.export(
            self._tracing.child_of(self._span.context),
            spans.BALANCER_QUEUE,
            self._began_ns,
            now_ns(),
            {},
            events=self._events,
            error=error,
        )

    def _end_route(self) -> None:
        if not self._called_ns:
            return
        attributes: dict[str, AttributeValue] = {spans.NUM_REFUSALS: self._num_refusals}
        if (replica_id := self._attributes.get(spans.REPLICA)) is not None:
            attributes[spans.REPLICA] = replica_id
        self._tracing.export(
            self._tracing.child_of(self._span.context),
            spans.ROUTE,
            self._called_ns,
            self._placed_ns or now_ns(),
            attributes,
            error=None if self._placed_ns else self._error,
        )
        self._called_ns = 0


class Phase:
    """A span around what runs inside, below the current request's root; nothing if that is not sampled."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._trace = _current.get()

    def __enter__(self) -> Self:
        if self._trace is not None:
            self._began_ns = now_ns()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._trace is not None:
            self._trace.child(self._name, self._began_ns, {}, error=None if error is None else _describe(error))


def _describe(error: BaseException) -> str:
    return str(error) or type(error).__name__


class DetokenizeTrace:
    """The detokenising of one engine request: a span from its first tokens to its last, with the time that it took.

    Attributes:
        busy_s: for whoever detokenises to add to.
    """

    def __init__(self, trace: RequestTrace) -> None:
        self.busy_s = 0.0
        self._trace = trace
        self._began_ns = now_ns()

    def end(self) -> None:
        """The last text is out, or nobody wants it."""
        self._trace.child(spans.DETOKENIZE, self._began_ns, {spans.BUSY_TIME: self.busy_s})
