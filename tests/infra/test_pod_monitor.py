"""What Prometheus keeps of what Ray's agents export: no series twice, and by the names of dashboards and alerts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from app.telemetry.metrics import ALL_METRICS
from tests.infra.custom_resources import CUSTOM_RESOURCES, problems

ROOT = Path(__file__).parents[2]
MONITOR = yaml.safe_load((ROOT / "infra" / "kubernetes" / "base" / "pod_monitor.yaml").read_text())
EXPORTED = [f"ray_{metric.name}" for metric in ALL_METRICS]


def relabeled(rules: list[dict[str, Any]], labels: dict[str, str]) -> dict[str, str] | None:
    """What Prometheus makes of a series' labels (its `relabel_configs`, as far as they are used); None: dropped."""
    for rule in rules:
        value = ";".join(labels.get(name, "") for name in rule.get("sourceLabels", []))
        match = re.fullmatch(rule.get("regex", "(.*)"), value, re.DOTALL)
        action = rule.get("action", "replace")
        if action == "drop" and match:
            return None
        if action == "replace" and match:
            replacement = re.sub(r"\$(\d+)", r"\\\1", rule.get("replacement", "$1"))
            labels = {**labels, rule["targetLabel"]: match.expand(replacement)}
        assert action in ("drop", "replace")
    return labels


def endpoint(monitor: dict[str, Any]) -> dict[str, Any]:
    (found,) = monitor["spec"]["podMetricsEndpoints"]
    return dict(found)


def test_what_metrics_has_is_not_read_a_second_time() -> None:
    rules = endpoint(MONITOR)["metricRelabelings"]
    assert [name for name in EXPORTED if relabeled(rules, {"__name__": name}) is not None] == []
    for name in ("ray_node_cpu_utilization", "ray_serve_num_http_requests_total", "up"):
        assert relabeled(rules, {"__name__": name}) == {"__name__": name}


def test_the_guides_other_way_names_series_as_metrics_does() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "metricRelabelings" in text)
    other = yaml.safe_load(block)
    changed = {**MONITOR["spec"], "podMetricsEndpoints": [{**endpoint(MONITOR), **other}]}
    assert problems(changed, CUSTOM_RESOURCES["monitoring.coreos.com/v1", "PodMonitor"], "PodMonitor") == []
    found = [relabeled(other["metricRelabelings"], {"__name__": name}) for name in EXPORTED]
    assert found == [{"__name__": metric.name} for metric in ALL_METRICS]
    assert relabeled(other["metricRelabelings"], {"__name__": "ray_node_mem_used"}) == {"__name__": "ray_node_mem_used"}
    assert relabeled(other["relabelings"], {}) == {"ray_io_node_type": "", "job": "quire"}
