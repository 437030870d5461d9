"""Traces the requests for tokens: W3C context in, a root span around the answer, `traceresponse` out."""

from __future__ import annotations

from http import HTTPMethod

from opentelemetry.trace import SpanKind
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.telemetry import spans
from app.telemetry.logs import note_trace, serve_request_id
from app.telemetry.request_trace import RequestTrace
from app.telemetry.tracing import Tracing

# What is generated in answer to which path, as the conventions call it.
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
# https://w3c.github.io/trace-context/#traceresponse-header
RESPONSE_HEADER = "traceresponse"


class TraceMiddleware:
    """The outermost layer of a traced application. Requests that are not sampled go through as they are."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self.app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = self._begin(scope)
        if trace is None:
            await self.app(scope, receive, send)
            return
        header = f"00-{trace.trace_id}-{trace.span_id}-01"

        async def send_traced(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[RESPONSE_HEADER] = header
                trace.sent(message["status"])
            await send(message)

        with trace.active():
            note_trace()
            try:
                await self.app(scope, receive, send_traced)
            finally:
                trace.end()

    def _begin(self, scope: Scope) -> RequestTrace | None:
        if scope["type"] != "http" or scope["method"] != HTTPMethod.POST:
            return None
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        operation = OPERATIONS.get(path)
        if operation is None:
            return None
        name = f"{scope['method']} {path}"
        attributes = {
            spans.REQUEST_METHOD: scope["method"],
            spans.HTTP_ROUTE: path,
            spans.URL_PATH: scope["path"],
            spans.URL_SCHEME: scope.get("scheme", "http"),
            spans.OPERATION: operation,
            spans.PROVIDER: "quire",
        }
        if request_id := serve_request_id():
            attributes[spans.REQUEST_ID] = request_id
        span = self._tracing.begin(_carrier(Headers(scope=scope)), name, SpanKind.SERVER, attributes)
        return None if span is None else RequestTrace(self._tracing, span, name, attributes)


def _carrier(headers: Headers) -> dict[str, str]:
    """The W3C headers among a request's; a `tracestate` in several lines is one list."""
    lines = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
    return {name: ",".join(found) for name, found in lines.items() if found}
