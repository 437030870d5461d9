"""What PromQL of alerts and dashboards asks for, compared with what `/metrics` has."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Labels that Prometheus adds to what it scrapes.
TARGET_LABELS = {"job", "instance"}
# Name of a series → its labels.
Exposed = dict[str, set[str]]
# Series that Prometheus has of its own.
PROMETHEUS: Exposed = {"up": TARGET_LABELS, "ALERTS": {"alertname", "alertstate", "severity"}}

_NAME = r"\b(quire_\w+|up|ALERTS)\b"


def query_problems(query: str, exposed: Exposed) -> Iterator[str]:
    """Series and labels of a query that `/metrics` does not have."""
    names = re.findall(_NAME, query)
    if not names:
        yield "asks for no series"
    for name in names:
        if name not in exposed:
            yield f"{name} is not exposed"
    for name, selector in re.findall(_NAME + r"\{([^}]*)\}", query):
        for label in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector):
            if label not in exposed.get(name, {label}):
                yield f"{name} has no label {label}"
    known = set().union(*exposed.values())
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        for label in labels.split(","):
            if label.strip() not in known:
                yield f"no series has a label {label.strip()}"
