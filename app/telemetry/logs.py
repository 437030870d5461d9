"""Log lines of Quire's processes: all by Serve's logger, with the ids of the request and the trace that they concern.

Serve writes what its logger `ray.serve` gets in one format, to one file a process; a config's `logging_config` says
which: text or JSON lines, from which level on, and where. Here the engine's and the application's own loggers are
joined to it, and each line gets `request_id` and `trace_id` where there are any.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from logging.handlers import MemoryHandler
from typing import Any, NamedTuple

from app.telemetry.request_trace import current_trace

SERVE_LOGGER = "ray.serve"
# Whose lines go the same way; of OpenTelemetry's only what is wrong.
_JOINED = {"app": logging.DEBUG, "engine": logging.DEBUG, "opentelemetry": logging.WARNING}
_REMEMBERED_TRACES = 4096

_trace_id: ContextVar[str] = ContextVar("quire_log_trace_id", default="")


class LogOrigin(NamedTuple):
    """Where a replica's other processes log, as the replica itself does.

    Attributes:
        component_name, component_id: as Serve calls the deployment and the replica.
        logging_config: Serve's, as a dict; None if the config has none.
    """

    component_name: str
    component_id: str
    logging_config: dict[str, Any] | None


class TraceIds:
    """The last requests' trace ids: Serve writes its line for a call when the call's context has gone."""

    def __init__(self, capacity: int = _REMEMBERED_TRACES) -> None:
        self._capacity = capacity
        self._ids: OrderedDict[str, str] = OrderedDict()

    def remember(self, request_id: str, trace_id: str) -> None:
        """A sampled request has come."""
        self._ids[request_id] = trace_id
        if len(self._ids) > self._capacity:
            self._ids.popitem(last=False)

    def get(self, request_id: str) -> str:
        """Its trace's id, or nothing."""
        return self._ids.get(request_id, "")


_seen = TraceIds()


@contextmanager
def logged_as(trace_id: str) -> Iterator[None]:
    """Put a trace's id on what is logged inside, where there is no RequestTrace: in a replica."""
    token = _trace_id.set(trace_id)
    _remember(trace_id)
    try:
        yield
    finally:
        _trace_id.reset(token)


def note_trace() -> None:
    """The current request's trace has begun, in an ingress: lines after its end may still concern it."""
    trace = current_trace()
    if trace is not None:
        _remember(trace.trace_id)


def _remember(trace_id: str) -> None:
    request_id = serve_request_id()
    if request_id and trace_id:
        _seen.remember(request_id, trace_id)


def serve_request_id() -> str:
    """The request's id in Serve, its x-request-id, in ingress and replica alike; empty outside of a request."""
    # Not imported for this: whoever serves has it.
    context: Any = sys.modules.get("ray.serve.context")
    return "" if context is None else str(context._get_serve_request_context().request_id)


class RequestFields(logging.Filter):
    """Lets every line pass, with `request_id` and `trace_id` if it concerns a request.

    Sits at Serve's logger: Serve replaces the handlers when its logging config changes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        fields = record.__dict__
        if "request_id" not in fields and (request_id := serve_request_id()):
            fields["request_id"] = request_id
        if "trace_id" not in fields:
            trace = current_trace()
            trace_id = trace.trace_id if trace is not None else _trace_id.get()
            trace_id = trace_id or _seen.get(fields.get("request_id", ""))
            if trace_id:
                fields["trace_id"] = trace_id
        _show_traces(logging.getLogger(SERVE_LOGGER))
        return True


class TracedText(logging.Formatter):
    """Another formatter's text, with the trace's id at the end of its first line."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        text = self._inner.format(record)
        trace_id = getattr(record, "trace_id", "")
        if not trace_id:
            return text
        first, newline, rest = text.partition("\n")
        return f"{first} trace_id={trace_id}{newline}{rest}"


def _show_traces(logger: logging.Logger) -> None:
    """Have Serve's text show the trace; its JSON shows all fields by itself."""
    from ray.serve._private.logging_utils import ServeFormatter

    for handler in logger.handlers:
        target = handler.target if isinstance(handler, MemoryHandler) else handler
        if target is not None and isinstance(target.formatter, ServeFormatter):
            target.setFormatter(TracedText(target.formatter))


class Forward(logging.Handler):
    """Hands lines to another logger as they are."""

    def __init__(self, target: logging.Logger) -> None:
        super().__init__()
        self._target = target

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= self._target.getEffectiveLevel():
            self._target.handle(record)


def drop_access_lines(record: logging.LogRecord) -> bool:
    """Serve's line for each call, which it writes unless its logging config says otherwise."""
    return not getattr(record, "serve_access_log", False)


def join_logs(logging_config: dict[str, Any] | None) -> None:
    """Join this process' loggers. Idempotent.

    Args:
        logging_config: of the deployment, None if it has none; then Serve's line for each call is left out.
    """
    target = logging.getLogger(SERVE_LOGGER)
    target.filters.clear()
    target.addFilter(RequestFields())
    if logging_config is None:
        target.addFilter(drop_access_lines)
    for name, level in _JOINED.items():
        logger = logging.getLogger(name)
        logger.handlers = [Forward(target)]
        logger.setLevel(level)
        logger.propagate = False


def configure_rank_logs(origin: LogOrigin, rank: int) -> None:
    """Let a rank's process, which is no replica of Serve's, log as its replica does, to a file of its own."""
    from ray.serve._private.common import ServeComponentType
    from ray.serve._private.logging_utils import configure_component_logger
    from ray.serve.schema import LoggingConfig

    configure_component_logger(
        component_name=origin.component_name,
        component_id=f"{origin.component_id}-rank{rank}",
        component_type=ServeComponentType.REPLICA,
        logging_config=LoggingConfig(**(origin.logging_config or {})),
    )
    join_logs(origin.logging_config)


def origin_of_replica() -> LogOrigin:
    """This replica's own; within a replica of Serve's."""
    from ray import serve

    context = serve.get_replica_context()
    name = f"{context.app_name}_{context.deployment}" if context.app_name else context.deployment
    given = context._deployment_config.logging_config
    if given is not None and not isinstance(given, dict):
        given = given.model_dump()
    return LogOrigin(name, context.replica_id.unique_id, given)
