"""The Grafana dashboards of infra/monitoring/dashboards, as queries and panels from which the files are made."""

from __future__ import annotations

from infra.monitoring.panels.balancer import BALANCER
from infra.monitoring.panels.elasticity import ELASTICITY
from infra.monitoring.panels.engine import ENGINE
from infra.monitoring.panels.overview import OVERVIEW

__all__ = ["DASHBOARDS"]

DASHBOARDS = (OVERVIEW, ENGINE, BALANCER, ELASTICITY)
