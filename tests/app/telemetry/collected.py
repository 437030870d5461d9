"""Spans in memory, as trees that tests can compare."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.telemetry.tracing import Tracing


class Collected:
    """A Tracing whose spans stay in this process."""

    def __init__(self, *, captures_content: bool = False) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(self._exporter, captures_content=captures_content)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """All that were exported, in the order of their ends."""
        self.tracing.flush()
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> ReadableSpan:
        """The only span of this name."""
        (span,) = (span for span in self.spans if span.name == name)
        return span

    def tree(self) -> dict[str, list[str]]:
        """Name of each parent → names of its children in the order of their starts; spans without one are under ""."""
        names = {span.context.span_id: span.name for span in self.spans if span.context is not None}
        children: dict[str, list[str]] = {}
        for span in sorted(self.spans, key=lambda span: span.start_time or 0):
            parent = "" if span.parent is None else names.get(span.parent.span_id, "elsewhere")
            children.setdefault(parent, []).append(span.name)
        return children


def attributes_of(span: ReadableSpan) -> dict[str, object]:
    """A span's attributes."""
    return dict(span.attributes or {})
