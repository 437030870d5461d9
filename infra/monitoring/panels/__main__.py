"""`python -m infra.monitoring.panels` writes the dashboards anew: what is committed is what Grafana reads."""

from __future__ import annotations

from pathlib import Path

from infra.monitoring.panels import DASHBOARDS
from infra.monitoring.panels.render import content

if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "dashboards"
    folder.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.uid}.json").write_text(content(dashboard))
