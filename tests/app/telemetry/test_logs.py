from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from opentelemetry.trace import SpanKind

from app.telemetry import logs
from app.telemetry.logs import SERVE_LOGGER, TraceIds, join_logs, logged_as
from app.telemetry.request_trace import RequestTrace
from tests.app.telemetry.collected import Collected

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from ray._common.formatters import JSONFormatter
    from ray.serve._private.logging_utils import ServeFormatter

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Output:
    """Serve's logger with a text and a JSON handler, as a replica has them."""

    def __init__(self) -> None:
        self._streams = (io.StringIO(), io.StringIO())
        self.logger = logging.getLogger(SERVE_LOGGER)
        self.logger.handlers = []
        for stream, formatter in zip(self._streams, (ServeFormatter("engine", "r1"), JSONFormatter()), strict=True):
            handler = logging.StreamHandler(stream)
            handler.setFormatter(formatter)
            self.logger.addHandler(handler)

    @property
    def text(self) -> list[str]:
        return self._streams[0].getvalue().splitlines()

    @property
    def fields(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._streams[1].getvalue().splitlines()]


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> Iterator[Output]:
    """What the logs say; all loggers are left as they were found."""
    monkeypatch.setattr(logs, "_seen", TraceIds())
    found = {name: logging.getLogger(name) for name in (SERVE_LOGGER, "app", "engine", "opentelemetry")}
    before = {name: (one.handlers[:], one.filters[:], one.level, one.propagate) for name, one in found.items()}
    output = Output()
    output.logger.setLevel(logging.INFO)
    output.logger.propagate = False
    join_logs({"encoding": "JSON"})
    yield output
    for name, one in found.items():
        one.handlers, one.filters, level, one.propagate = before[name]
        one.setLevel(level)


def serve_request(monkeypatch: pytest.MonkeyPatch, request_id: str) -> None:
    context = SimpleNamespace(request_id=request_id)
    monkeypatch.setitem(sys.modules, "ray.serve.context", SimpleNamespace(_get_serve_request_context=lambda: context))


def test_the_engines_and_the_applications_lines_are_serves(output: Output) -> None:
    logging.getLogger("engine.kernels").warning("slow kernels")
    logging.getLogger("app.balancer.placer").info("a choice")
    logging.getLogger("engine.build").debug("not at this level")
    logging.getLogger("opentelemetry.sdk").info("not of a library")
    assert [line.rsplit(" -- ")[-1] for line in output.text] == ["slow kernels", "a choice"]
    assert [(line["levelname"], line["message"]) for line in output.fields] == [
        ("WARNING", "slow kernels"),
        ("INFO", "a choice"),
    ]
    assert not any("trace_id" in line or "request_id" in line for line in output.fields)


def test_a_lines_request_and_trace(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_request(monkeypatch, "req-1")
    with logged_as(TRACE):
        logging.getLogger("engine.build").info("in a replica")
    collected = Collected()
    span = collected.tracing.begin({}, "x", SpanKind.SERVER, {})
    assert span is not None
    trace = RequestTrace(collected.tracing, span, "x", {})
    with trace.active():
        output.logger.info("in an ingress")
    assert [(line["request_id"], line["trace_id"]) for line in output.fields] == [
        ("req-1", TRACE),
        ("req-1", trace.trace_id),
    ]
    assert all("req-1 -- " in line for line in output.text)
    assert output.text[0].endswith(f"in a replica trace_id={TRACE}")


def test_a_line_after_the_requests_context_finds_its_trace_by_the_request(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_request(monkeypatch, "req-1")
    with logged_as(TRACE):
        pass
    serve_request(monkeypatch, "")
    output.logger.info("CALL generate OK", extra={"request_id": "req-1", "serve_access_log": True})
    output.logger.info("another", extra={"request_id": "req-2"})
    assert [line.get("trace_id") for line in output.fields] == [TRACE, None]


def test_the_trace_stands_in_the_first_line_of_a_stack(output: Output) -> None:
    try:
        raise ValueError("no")
    except ValueError:
        with logged_as(TRACE):
            output.logger.exception("it failed")
    assert output.text[0].endswith(f"it failed trace_id={TRACE}")
    assert output.text[-1] == "ValueError: no"


def test_serves_line_for_each_call_is_left_out_unless_the_config_has_a_say(output: Output) -> None:
    access = {"serve_access_log": True}
    join_logs(None)
    output.logger.info("CALL generate OK", extra=access)
    output.logger.info("another")
    assert [line["message"] for line in output.fields] == ["another"]
    join_logs({"enable_access_log": True})
    output.logger.info("CALL generate OK", extra=access)
    assert output.fields[-1]["message"] == "CALL generate OK"


def test_handlers_that_serve_has_replaced_show_the_trace_too(output: Output) -> None:
    output.logger.handlers.clear()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ServeFormatter("engine", "r1"))
    output.logger.addHandler(handler)
    with logged_as(TRACE):
        output.logger.info("again")
    assert stream.getvalue().endswith(f"again trace_id={TRACE}\n")


def test_only_the_last_requests_are_remembered() -> None:
    ids = TraceIds(2)
    for number in range(3):
        ids.remember(f"r{number}", f"t{number}")
    assert [ids.get(f"r{number}") for number in range(3)] == ["", "t1", "t2"]
