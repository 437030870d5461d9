"""A dashboard as Grafana imports and provisions it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from infra.monitoring.panels.model import Dashboard, Kind, Panel, Row, Variable

# Grafana's 10.1 and later read it.
SCHEMA_VERSION = 36
_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def content(dashboard: Dashboard) -> str:
    """Its file."""
    return json.dumps(rendered(dashboard), indent=1) + "\n"


def rendered(dashboard: Dashboard) -> dict[str, Any]:
    """As Grafana imports and provisions it."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["quire"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {
                "title": "Quire",
                "type": "dashboards",
                "tags": ["quire"],
                "icon": "external link",
                "tooltip": "",
                "url": "",
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
            }
        ],
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": _DATASOURCE,
                    "enable": True,
                    "hide": False,
                    "iconColor": "red",
                    "expr": 'ALERTS{alertname=~"Quire.*", alertstate="firing"}',
                }
            ]
        },
        "templating": {"list": [_datasource_variable(), *(_variable(each) for each in dashboard.variables)]},
        "panels": list(_panels(dashboard.rows)),
    }


def _datasource_variable() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "refresh": 1,
    }


def _variable(variable: Variable) -> dict[str, Any]:
    common = {"name": variable.name, "label": variable.label, "hide": 0}
    if variable.values:
        options = [{"text": each, "value": each, "selected": each == variable.chosen} for each in variable.values]
        return common | {
            "type": "custom",
            "query": ",".join(variable.values),
            "options": options,
            "current": {"text": variable.chosen, "value": variable.chosen, "selected": True},
            "multi": False,
            "includeAll": False,
        }
    return common | {
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": variable.query, "refId": "variable"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also what has no such label.
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
    }


def _panels(rows: tuple[Row, ...]) -> Iterator[dict[str, Any]]:
    number = y = 0
    for row in rows:
        number += 1
        grid = {"h": 1, "w": _COLUMNS, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": grid, "panels": []}
        x, y = 0, y + 1
        height = 0
        for panel in row.panels:
            if x + panel.width > _COLUMNS:
                x, y = 0, y + height
            number += 1
            height = 4 if panel.kind == "stat" else 8
            yield _panel(panel, number) | {"gridPos": {"h": height, "w": panel.width, "x": x, "y": y}}
            x += panel.width
        y += height


def _panel(panel: Panel, number: int) -> dict[str, Any]:
    description = f"{panel.description} Red: {panel.alert}.".strip() if panel.alert else panel.description
    form = {
        "datasource": _DATASOURCE,
        "editorMode": "code",
        "range": True,
        **({"format": "heatmap"} if panel.kind == "heatmap" else {}),
    }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        **({"description": description} if description else {}),
        "datasource": _DATASOURCE,
        "targets": [
            {
                **form,
                "refId": chr(ord("A") + index),
                "expr": query.expr,
                **({"legendFormat": query.legend} if query.legend else {}),
                "exemplar": "_bucket" in query.expr and panel.kind == "timeseries",
            }
            for index, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.red is not None:
        steps.append({"color": "red", "value": panel.red})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 30 if panel.stacked else 5,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "off" if panel.red is None else "line"},
        }
    return defaults


_OPTIONS: dict[Kind, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "textMode": "value",
        "justifyMode": "auto",
        "orientation": "auto",
    },
    "heatmap": {
        "calculate": False,
        "yAxis": {"unit": "s"},
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
        "legend": {"show": True},
        "showValue": "never",
        "tooltip": {"show": True, "yHistogram": False},
    },
}
