from __future__ import annotations

import time

import pytest
from opentelemetry.trace import SpanKind

from app.telemetry import spans
from app.telemetry.engine_trace import EngineTrace
from app.telemetry.tracing import SampledSpan, now_ns
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams
from tests.app.telemetry.collected import Collected, attributes_of


@pytest.fixture
def collected() -> Collected:
    return Collected()


def attempt_of(collected: Collected) -> SampledSpan:
    span = collected.tracing.begin({}, "attempt", SpanKind.CLIENT, {})
    assert span is not None
    return span


def make_trace(collected: Collected, resumed: tuple[ResumedSequence, ...] = ()) -> EngineTrace:
    span = collected.tracing.child_of(attempt_of(collected).context)
    request = EngineRequest("request", [1] * 20, SamplingParams(), resumed=resumed)
    return EngineTrace(collected.tracing, span, "tiny", request)


def test_phases_become_spans_at_their_times(collected: Collected) -> None:
    trace = make_trace(collected)
    timeline, t0 = trace.timeline, time.monotonic()
    before_ns = now_ns()
    timeline.started(t0 + 1)
    timeline.computed(t0 + 1, t0 + 2, 16, draws=False)
    timeline.computed(t0 + 2, t0 + 3, 4, draws=True)
    timeline.preempted(t0 + 4, swapped=True)
    timeline.started(t0 + 5)
    timeline.computed(t0 + 5, t0 + 6, 1, draws=True)
    timeline.preempted(t0 + 7, swapped=False)
    timeline.started(t0 + 8)
    timeline.computed(t0 + 8, t0 + 9, 30, draws=True)
    timeline.end(t0 + 10)
    trace.end(3, 12, {0: "stop"})
    assert collected.tree() == {
        "elsewhere": ["engine"],
        "engine": [
            "engine queue",
            "prefill",
            "prefill",
            "decode",
            "preempted",
            "decode",
            "preempted",
            "prefill",
            "decode",
        ],
    }
    children = [span for span in collected.spans if span.name != "engine"]
    seconds = [
        (span.name, round(((span.start_time or 0) - before_ns) / 1e9), round(((span.end_time or 0) - before_ns) / 1e9))
        for span in children
    ]
    assert seconds == [
        ("engine queue", 0, 1),
        ("prefill", 1, 2),
        ("prefill", 2, 3),
        ("decode", 3, 4),
        ("preempted", 4, 5),
        ("decode", 5, 7),
        ("preempted", 7, 8),
        ("prefill", 8, 9),
        ("decode", 9, 10),
    ]
    assert [attributes_of(span) for span in children if span.name == "prefill"] == [
        {spans.CHUNK_TOKENS: 16},
        {spans.CHUNK_TOKENS: 4},
        {spans.CHUNK_TOKENS: 30},
    ]
    kinds = [attributes_of(span)[spans.PREEMPTION_KIND] for span in children if span.name == "preempted"]
    assert kinds == ["swap", "recompute"]
    engine = collected.named("engine")
    assert engine.kind is SpanKind.SERVER
    attributes = attributes_of(engine)
    assert attributes.pop(spans.TIME_TO_FIRST_TOKEN) == pytest.approx(3.0, abs=0.1)
    assert attributes == {
        spans.PROVIDER: "quire",
        spans.REQUEST_MODEL: "tiny",
        spans.ENGINE_REQUEST_ID: "request",
        spans.INPUT_TOKENS: 20,
        spans.CACHED_INPUT_TOKENS: 3,
        spans.OUTPUT_TOKENS: 12,
        spans.RESPONSE_FINISH_REASONS: ["stop"],
        spans.NUM_PREEMPTIONS: 2,
    }


def test_a_resumed_request_says_so(collected: Collected) -> None:
    trace = make_trace(collected, (ResumedSequence((7, 8, 9)),))
    trace.timeline.end(time.monotonic())
    trace.end(0, 0, {0: "abort"})
    attributes = attributes_of(collected.named("engine"))
    assert attributes[spans.RESUMED_TOKENS] == 3
    assert spans.TIME_TO_FIRST_TOKEN not in attributes
    assert not collected.named("engine").status.description


def test_failures_and_refusals_set_the_status(collected: Collected) -> None:
    make_trace(collected).failed("too long")
    trace = make_trace(collected)
    trace.timeline.end(time.monotonic())
    trace.end(0, 0, {0: "error"})
    engines = [span for span in collected.spans if span.name == "engine"]
    assert [span.status.description for span in engines] == ["too long", "the engine failed"]
