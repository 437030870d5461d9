"""`python -m infra.monitoring` writes what is made from other files: the dashboards, and the operator's alert rules."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from infra.monitoring.panels import DASHBOARDS
from infra.monitoring.panels.render import content

FOLDER = Path(__file__).parent
_RULE_HEADER = """\
# alerts.yaml as the Prometheus operator reads it, written by `python -m infra.monitoring`.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: quire
spec:
"""


def prometheus_rule(alerts: str) -> str:
    """The groups of a file of rules as a PrometheusRule."""
    return _RULE_HEADER + textwrap.indent(alerts[alerts.index("groups:") :], "  ")


def made_files() -> Iterator[tuple[Path, str]]:
    """The files as they are to be, by their path below this folder."""
    for dashboard in DASHBOARDS:
        yield Path("dashboards") / f"{dashboard.uid}.json", content(dashboard)
    yield Path("prometheus_rule.yaml"), prometheus_rule((FOLDER / "alerts.yaml").read_text())


if __name__ == "__main__":
    for path, text in made_files():
        (FOLDER / path).write_text(text)
