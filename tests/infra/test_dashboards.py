"""infra/monitoring/dashboards: dashboards by Grafana's types, of queries over metrics that `/metrics` has."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.telemetry.metrics import ALL_METRICS, TIME_PER_OUTPUT_TOKEN, TIME_TO_FIRST_TOKEN
from infra.monitoring.panels import DASHBOARDS
from infra.monitoring.panels.model import Panel
from infra.monitoring.panels.promql import FIRST_TOKEN_TARGET, TOKEN_TARGET
from tests.infra.grafana import layout_problems, schema_problems
from tests.infra.promtool import complaints, needs_promtool
from tests.infra.queries import Exposed, query_problems

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
FILES = sorted((MONITORING / "dashboards").iterdir())
ALERTS = {
    rule["alert"]: rule["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}

Document = dict[str, Any]


def read(path: Path) -> Document:
    return dict(json.loads(path.read_text()))


def targets(dashboard: Document) -> Iterator[tuple[str, Document]]:
    """Each query with its panel's title."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target


def metric_problems(dashboard: Document, exposed: Exposed) -> Iterator[str]:
    """Queries and variables of what is not exposed, and legends of labels that their query does not leave."""
    for title, target in targets(dashboard):
        for problem in query_problems(target["expr"], exposed):
            yield f"{title}: {problem}"
        left = {
            label.strip() for labels in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in labels.split(",")
        }
        for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")):
            if label not in left:
                yield f"{title}: no {label} for its legend"
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            asked = variable["query"]["query"]
            series, _, label = asked.removeprefix("label_values(").removesuffix(")").rpartition(", ")
            yield from query_problems(series, exposed)
            if label not in exposed.get(series.partition("{")[0], set()):
                yield f"{asked}: no label {label}"
    for annotation in dashboard["annotations"]["list"]:
        yield from query_problems(annotation["expr"], exposed)


def all_problems(dashboard: Document, exposed: Exposed) -> list[str]:
    found = schema_problems(dashboard)
    # The others rely on the shape.
    return found or [*layout_problems(dashboard), *metric_problems(dashboard, exposed)]


def threshold_problems(panel: Panel) -> Iterator[str]:
    """Red begins where the alert fires."""
    if panel.alert and panel.alert not in ALERTS:
        yield f"{panel.title}: no alert {panel.alert}"
    elif panel.alert and panel.red != 1 and f"> {panel.red:g}" not in ALERTS[panel.alert]:
        yield f"{panel.title}: {panel.alert} does not fire above {panel.red:g}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_dashboard_is_one_to_grafana_and_asks_for_what_is_exposed(path: Path, exposed: Exposed) -> None:
    dashboard = read(path)
    assert all_problems(dashboard, exposed) == []
    assert dashboard["uid"] == path.stem


def test_every_metric_is_on_a_dashboard() -> None:
    shown = set(
        re.findall(r"quire_\w+", " ".join(target["expr"] for path in FILES for _, target in targets(read(path))))
    )
    names = {f"{each.name}_bucket" if each.type == "histogram" else each.name for each in ALL_METRICS}
    assert names - shown == set()


def test_every_alert_that_has_a_threshold_of_a_panel_agrees_with_it() -> None:
    panels = [panel for dashboard in DASHBOARDS for row in dashboard.rows for panel in row.panels]
    assert [problem for panel in panels for problem in threshold_problems(panel)] == []
    assert sum(bool(panel.alert) for panel in panels) >= 10
    (panel,) = (panel for panel in panels if panel.title == "Wrong routes")
    assert list(threshold_problems(panel._replace(red=0.2))) == [
        "Wrong routes: QuireWrongRoutes does not fire above 0.2"
    ]
    assert list(threshold_problems(panel._replace(alert="QuireGone"))) == ["Wrong routes: no alert QuireGone"]


def test_goodput_is_asked_of_buckets_that_there_are() -> None:
    assert set(map(float, FIRST_TOKEN_TARGET.values)) <= set(TIME_TO_FIRST_TOKEN.buckets)
    assert set(map(float, TOKEN_TARGET.values)) <= set(TIME_PER_OUTPUT_TOKEN.buckets)
    # As they are written in the label.
    assert {str(float(value)) for value in FIRST_TOKEN_TARGET.values} == set(FIRST_TOKEN_TARGET.values)
    assert {str(float(value)) for value in TOKEN_TARGET.values} == set(TOKEN_TARGET.values)


@needs_promtool
def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    rules: list[dict[str, str]] = []
    for path in FILES:
        for _, target in targets(read(path)):
            expr = target["expr"].replace("$__rate_interval", "1m")
            rules.append({"record": f"query:{len(rules)}", "expr": re.sub(r"\$\w+", "x", expr)})
    assert len(rules) > 40
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    assert complaints("check", "rules", file) == ""
    file.write_text(file.read_text().replace("sum by (model) (", "sum by (model (", 1))
    assert "parse error" in complaints("check", "rules", file)


def _panel(dashboard: Document) -> Document:
    return next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries")


MISTAKES: dict[str, tuple[Callable[[Document], object], str]] = {
    "a field of the dashboard": (lambda of: of.update(timeZone="utc"), "timeZone is no such field"),
    "a field of a panel": (lambda of: _panel(of).update(span=4), "span is no such field"),
    "a field of a query": (lambda of: _panel(of)["targets"][0].update(query="up"), "query is no such field"),
    "a field of the options": (lambda of: _panel(of)["options"]["legend"].update(shown=True), "shown is no such field"),
    "a field of the drawing": (
        lambda of: _panel(of)["fieldConfig"]["defaults"]["custom"].update(fill=1),
        "fill is no such field",
    ),
    "a style of drawing": (
        lambda of: _panel(of)["fieldConfig"]["defaults"]["custom"].update(drawStyle="lines"),
        "'lines' is none of",
    ),
    "a text where a number goes": (lambda of: _panel(of).update(id="1"), "'1' is no int"),
    "a panel of another": (lambda of: _panel(of).update(id=1), "two panels have one id"),
    "a place of another": (lambda of: _panel(of)["gridPos"].update(x=8), "lies over"),
    "a place beside the page": (lambda of: _panel(of)["gridPos"].update(x=20), "is wider than the page"),
    "a unit": (lambda of: _panel(of)["fieldConfig"]["defaults"].update(unit="parsec"), "parsec is no unit"),
    "a datasource of one's own": (lambda of: _panel(of)["datasource"].update(uid="P1"), "does not ask the datasource"),
    "a variable": (
        lambda of: _panel(of)["targets"][0].update(expr='quire_replicas{model="$models"}'),
        "no variable models",
    ),
    "a metric": (lambda of: _panel(of)["targets"][0].update(expr="sum(quire_gone)"), "quire_gone is not exposed"),
    "a label": (
        lambda of: _panel(of)["targets"][0].update(expr='quire_replicas{class="x"}'),
        "quire_replicas has no label class",
    ),
    "a legend": (lambda of: _panel(of)["targets"][0].update(legendFormat="{{tenant}}"), "no tenant for its legend"),
    "a variable's label": (
        lambda of: of["templating"]["list"][1]["query"].update(query="label_values(quire_replicas, class)"),
        "no label class",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(mistake: str, exposed: Exposed) -> None:
    edit, problem = MISTAKES[mistake]
    dashboard = copy.deepcopy(read(MONITORING / "dashboards" / "quire-overview.json"))
    edit(dashboard)
    found = all_problems(dashboard, exposed)
    assert any(problem in each for each in found), found
