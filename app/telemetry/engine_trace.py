"""One sampled request in a replica: spans made from the engine's timeline once it has ended."""

from __future__ import annotations

import time
from collections.abc import Mapping

from opentelemetry.trace import SpanKind, format_trace_id
from opentelemetry.util.types import AttributeValue

from app.telemetry import spans
from app.telemetry.tracing import SampledSpan, Tracing, now_ns
from engine.request import EngineRequest
from engine.timeline import Phase, RequestTimeline

_NAMES = {
    "queue": spans.ENGINE_QUEUE,
    "prefill": spans.PREFILL,
    "decode": spans.DECODE,
    "swapped": spans.PREEMPTED,
    "recompute": spans.PREEMPTED,
}


class EngineTrace:
    """Below the attempt that its ingress has sent.

    Args:
        span: its own, below the attempt's.

    Attributes:
        timeline: for the engine to keep, in seconds of `time.monotonic()`.
    """

    def __init__(self, tracing: Tracing, span: SampledSpan, model_id: str, request: EngineRequest) -> None:
        self.timeline = RequestTimeline(time.monotonic())
        self._tracing = tracing
        self._span = span
        self._began_ns = now_ns()
        self._attributes: dict[str, AttributeValue] = {
            spans.PROVIDER: "quire",
            spans.REQUEST_MODEL: model_id,
            spans.ENGINE_REQUEST_ID: request.request_id,
            spans.INPUT_TOKENS: len(request.prompt_token_ids),
        }
        if num_resumed := sum(len(sequence.token_ids) for sequence in request.resumed):
            self._attributes[spans.RESUMED_TOKENS] = num_resumed

    @property
    def trace_id(self) -> str:
        """32 hex digits."""
        return format_trace_id(self._span.context.trace_id)

    def end(self, num_cached_tokens: int, num_output_tokens: int, finish_reasons: Mapping[int, str]) -> None:
        """The engine has ended it: export all of its spans. `finish_reasons` by sequence."""
        timeline, attributes = self.timeline, self._attributes
        attributes |= {
            spans.CACHED_INPUT_TOKENS: num_cached_tokens,
            spans.OUTPUT_TOKENS: num_output_tokens,
            spans.RESPONSE_FINISH_REASONS: [reason for _, reason in sorted(finish_reasons.items())],
        }
        first_token_at = timeline.first_token_at
        if first_token_at is not None:
            attributes[spans.TIME_TO_FIRST_TOKEN] = first_token_at - timeline.phases[0].began
        if preemptions := sum(phase.kind in ("swapped", "recompute") for phase in timeline.phases):
            attributes[spans.NUM_PREEMPTIONS] = preemptions
        error = "the engine failed" if "error" in finish_reasons.values() else None
        # The engine's clock is monotonic; it is put beside the wall's once, so that the phases fit together.
        offset_ns = now_ns() - time.monotonic_ns()
        for phase in timeline.phases:
            self._export_phase(phase, offset_ns)
        # Not now: its last tokens may have arrived since.
        self._finish(error, now_ns() if timeline.ended_at is None else round(timeline.ended_at * 1e9) + offset_ns)

    def failed(self, reason: str) -> None:
        """The engine did not take it, or will say no more of it: what it was doing is not known."""
        self._finish(reason, now_ns())

    def _export_phase(self, phase: Phase, offset_ns: int) -> None:
        attributes: dict[str, AttributeValue] = {}
        if phase.kind == "prefill":
            attributes[spans.CHUNK_TOKENS] = phase.num_tokens
        elif phase.kind in ("swapped", "recompute"):
            attributes[spans.PREEMPTION_KIND] = "swap" if phase.kind == "swapped" else "recompute"
        self._tracing.export(
            self._tracing.child_of(self._span.context),
            _NAMES[phase.kind],
            round(phase.began * 1e9) + offset_ns,
            round(phase.ended * 1e9) + offset_ns,
            attributes,
        )

    def _finish(self, error: str | None, ended_ns: int) -> None:
        self._tracing.export(
            self._span, spans.ENGINE, self._began_ns, ended_ns, self._attributes, kind=SpanKind.SERVER, error=error
        )
