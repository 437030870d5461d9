"""infra/monitoring: alerts that fire on their fault, over metrics that `/metrics` has, each with a remedy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.telemetry.metrics import ALL_METRICS
from infra.monitoring.__main__ import made_files
from tests.infra.kustomize import KustomizeError, render
from tests.infra.prometheus import config_for, shortened
from tests.infra.promtool import complaints, needs_promtool
from tests.infra.queries import TARGET_LABELS, Exposed, query_problems

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra" / "monitoring"
RULES = MONITORING / "alerts.yaml"
TESTS = MONITORING / "alerts.test.yaml"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def coverage_problems(cases: list[dict[str, Any]], rules: list[dict[str, Any]], exposed: Exposed) -> Iterator[str]:
    """Alerts without a test that they fire or are silent; tests of series as `/metrics` does not have them."""
    fired: set[str] = set()
    silent: set[str] = set()
    for case in cases:
        for each in case["alert_rule_test"]:
            (fired if each["exp_alerts"] else silent).add(each["alertname"])
        for each in case["input_series"]:
            yield from query_problems(each["series"], exposed)
            name, labels = each["series"].partition("{")[0], set(re.findall(r"(\w+)=", each["series"]))
            missing = exposed.get(name, set()) - TARGET_LABELS - labels
            if missing:
                yield f"{name} has also the labels {sorted(missing)}"
    for rule in rules:
        if rule["alert"] not in fired:
            yield f"no test shows that {rule['alert']} fires"
        if rule["alert"] not in silent:
            yield f"no test shows that {rule['alert']} is silent without its fault"


def documented(text: str) -> list[str]:
    """The alerts in the table of the operations guide."""
    section = text.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(Quire\w+)` \| [^|]+ \| [^|]+ \|$", section, re.MULTILINE)


def test_every_metric_of_the_table_is_in_the_exposition(exposed: Exposed) -> None:
    # The tests of queries below are as good as this list.
    expected = {f"{each.name}_bucket" if each.type == "histogram" else each.name for each in ALL_METRICS}
    assert expected <= exposed.keys()


@needs_promtool
def test_promtool_accepts_the_exposition_and_the_files(exposition: str) -> None:
    assert complaints("check", "metrics", stdin=exposition) == ""
    assert complaints("check", "rules", RULES) == ""
    assert complaints("check", "config", "--syntax-only", MONITORING / "prometheus.yaml") == ""


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_exposed(rule: dict[str, Any], exposed: Exposed) -> None:
    assert list(query_problems(rule["expr"], exposed)) == []
    assert rule["labels"]["severity"] in ("critical", "warning")


def test_every_alert_is_tested_on_series_as_they_are_exposed(exposed: Exposed) -> None:
    assert list(coverage_problems(yaml.safe_load(TESTS.read_text())["tests"], alerts(), exposed)) == []


@needs_promtool
def test_alerts_fire_on_their_fault_and_are_silent_without_it() -> None:
    assert complaints("test", "rules", TESTS) == ""


def test_the_guide_has_a_remedy_for_each_alert() -> None:
    assert documented((ROOT / "docs" / "operations.md").read_text()) == [rule["alert"] for rule in alerts()]


def test_prometheus_scrapes_the_job_that_the_alerts_name() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["quire"]
    assert config["rule_files"] == [RULES.name]


def test_the_operator_is_told_the_same() -> None:
    found = {manifest["kind"]: manifest for manifest in render(MONITORING)}
    assert found["PrometheusRule"]["spec"] == yaml.safe_load(RULES.read_text())
    (job,) = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    scrape = found["ScrapeConfig"]["spec"]
    (static,) = scrape["staticConfigs"]
    assert (scrape["metricsPath"], static["targets"]) == (job["metrics_path"], job["static_configs"][0]["targets"])
    assert static["labels"] == {"job": job["job_name"]}
    dashboards = found["ConfigMap"]
    assert dashboards["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert set(dashboards["data"]) == {path.name for path in (MONITORING / "dashboards").iterdir()}
    # `kubectl apply` keeps a copy in an annotation, which may have 256 KiB.
    assert len(json.dumps(dashboards)) < 200_000


def test_files_that_are_made_are_as_they_would_be_made_now() -> None:
    assert {str(path): (MONITORING / path).read_text() for path, _ in made_files()} == {
        str(path): text for path, text in made_files()
    }, "run python -m infra.monitoring"


@pytest.mark.parametrize(
    ("file", "right", "wrong", "problem"),
    [
        ("kustomization.yaml", "quire-engine.json", "quire-engines.json", "no file dashboards/quire-engines.json"),
        ("kustomization.yaml", "- dashboards/quire-engine.json", "- ../alerts.yaml", "no file ../alerts.yaml"),
        ("kustomization.yaml", "disableNameSuffixHash: true", "immutable: true", "named as it stands"),
    ],
)
def test_a_mistake_in_the_kustomization_is_caught(
    tmp_path: Path, file: str, right: str, wrong: str, problem: str
) -> None:
    shutil.copytree(MONITORING, tmp_path / "monitoring")
    path = tmp_path / "monitoring" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong, 1))
    with pytest.raises(KustomizeError, match=problem):
        render(path.parent)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("rate(quire_gone_total[5m])", "quire_gone_total is not exposed"),
        ("quire_time_to_first_token_seconds > 1", "quire_time_to_first_token_seconds is not exposed"),
        ('quire_replicas{class="default"}', "quire_replicas has no label class"),
        ("sum by (tenant) (quire_replicas)", "no series has a label tenant"),
        ("vector(1)", "asks for no series"),
    ],
)
def test_a_query_of_what_is_not_exposed_is_found(query: str, problem: str, exposed: Exposed) -> None:
    assert list(query_problems(query, exposed)) == [problem]


def test_an_alert_without_tests_and_a_series_without_its_labels_are_found(exposed: Exposed) -> None:
    cases = [{"input_series": [{"series": "quire_replicas"}], "alert_rule_test": []}]
    assert list(coverage_problems(cases, [{"alert": "QuireNew"}], exposed)) == [
        "quire_replicas has also the labels ['model']",
        "no test shows that QuireNew fires",
        "no test shows that QuireNew is silent without its fault",
    ]


@needs_promtool
def test_changed_rules_fail_their_tests(tmp_path: Path) -> None:
    changes = {
        "QuireKvCacheFull": ("> 0.95", "> 0.98"),
        "QuireSwapFull": ('state="free"', 'state="used"'),
        "QuireErrors": ('code=~"5.."', 'code=~"4.."'),
        "QuirePreempting": ("for: 10m", "for: 1h"),
        "QuireEngineStalled": ("[2m])) == 0", "[2m])) >= 0"),
        "QuireSlowFirstToken": ("sum by (model, class, le)", "sum by (model, le)"),
        "QuireDown": ("severity: critical", "severity: warning"),
    }
    before, *rules = re.split(r"(?=      - alert: )", RULES.read_text())
    for index, rule in enumerate(rules):
        name = rule.split()[2]
        if name in changes:
            old, new = changes[name]
            assert old in rule
            rules[index] = rule.replace(old, new)
    (tmp_path / RULES.name).write_text("".join((before, *rules)))
    shutil.copy(TESTS, tmp_path)
    failed = re.findall(r"alertname: (\w+), time", complaints("test", "rules", tmp_path / TESTS.name))
    assert set(failed) == changes.keys()


def test_rules_are_shortened_in_all_their_durations_and_in_nothing_else() -> None:
    def durations(rules: str) -> list[tuple[str, str]]:
        return re.findall(r"\[(\w+)\]|for: (\w+)", rules)

    before, after = RULES.read_text(), shortened(RULES.read_text())
    assert len(durations(before)) >= 30
    assert all(each.endswith("m") for pair in durations(before) for each in pair if each)
    assert durations(after) == [
        (f"{6 * int(window[:-1])}s" if window else "", f"{lasting[:-1]}s" if lasting else "")
        for window, lasting in durations(before)
    ]
    blank = re.compile(r"\[\w+\]|for: \w+")
    assert blank.sub("", after) == blank.sub("", before)
    assert [rule["alert"] for rule in yaml.safe_load(after)["groups"][0]["rules"]] == [
        rule["alert"] for rule in alerts()
    ]


@needs_promtool
def test_promtool_accepts_what_the_live_prometheus_is_given(tmp_path: Path) -> None:
    rules, config = tmp_path / "alerts.yaml", tmp_path / "prometheus.yaml"
    rules.write_text(shortened(RULES.read_text()))
    config.write_text(yaml.safe_dump(config_for("127.0.0.1:8000", tmp_path / "key", rules)))
    assert complaints("check", "config", "--syntax-only", config) == ""
    assert complaints("check", "rules", rules) == ""
    (job,) = yaml.safe_load(config.read_text())["scrape_configs"]
    (told,) = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["scrape_configs"]
    assert job.keys() == told.keys(), "only values differ"
    assert (job["job_name"], job["metrics_path"]) == (told["job_name"], told["metrics_path"])


@needs_promtool
def test_promtool_finds_a_broken_query_a_bad_name_and_a_bad_setting(tmp_path: Path) -> None:
    broken = tmp_path / "alerts.yaml"
    broken.write_text(RULES.read_text().replace("sum by (model)", "sum by model", 1))
    assert "parse error" in complaints("check", "rules", broken)
    assert "_total" in complaints("check", "metrics", stdin="# HELP a_b A.\n# TYPE a_b counter\na_b 1\n")
    broken.write_text((MONITORING / "prometheus.yaml").read_text().replace("15s", "15 s"))
    assert complaints("check", "config", "--syntax-only", broken) != ""
