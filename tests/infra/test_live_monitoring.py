"""Prometheus reads a running application: every panel has data, and alerts fire when their fault is made.

The rules and the scrape are the repository's own, minutes shortened to seconds. Of the alerts, three are left to
promtool: QuireReplicasFlapping, which takes a dozen restarts; QuireWrongRoutes, as the balancer's index is exact and
its links would have to lie; QuireUsageLost, which takes tens of thousands of requests.
"""

from __future__ import annotations

import json
import math
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from app.config import INGRESS, engine_deployment_name
from benchmarks.fleet.server import serving
from tests.infra.monitored import (
    ADAPTED,
    BROKEN,
    KEY,
    LATE,
    PRESSED,
    SCALED,
    USAGE,
    Users,
    monitored_config,
    processes,
    send_signal,
)
from tests.infra.prometheus import MONITORING, RATE_INTERVAL, Prometheus, prometheus, scraping

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(prometheus is None, reason="prometheus is missing, which .ci/run unpacks"),
]

# On a machine that does much else besides.
PATIENCE_S = 240.0
# What the load alone makes fire.
OF_LOAD = {
    ("QuireErrors", f"{ADAPTED}:{BROKEN}"),
    ("QuireAdaptersThrashing", ADAPTED),
    ("QuireAdapterLoadsFailing", ADAPTED),
    ("QuireSlowTokens", LATE),
    ("QuireKvCacheFull", PRESSED),
    ("QuirePreempting", PRESSED),
    ("QuireSwapFull", PRESSED),
    ("QuireSlowFirstToken", LATE),
    ("QuireRefusing", LATE),
    ("QuireQueueStanding", LATE),
    ("QuireReplicasMissing", SCALED),
}
# What a killed or stopped process makes fire, and the end of the application.
OF_FAULTS = {
    ("QuireEngineStalled", SCALED),
    ("QuireResubmitting", SCALED),
    ("QuireModelWithoutReplicas", SCALED),
    ("QuireIngressMissing", ""),
    ("QuireUsageLedger", ""),
    ("QuireDown", ""),
}
LEFT_TO_PROMTOOL = {"QuireReplicasFlapping", "QuireWrongRoutes", "QuireUsageLost"}
# Nothing of the kind is the matter with these, whatever the machine's speed.
NEVER = {
    *(("QuireAdaptersThrashing", model) for model in (PRESSED, LATE, SCALED)),
    *(("QuireAdapterLoadsFailing", model) for model in (PRESSED, LATE, SCALED)),
    *(("QuireSwapFull", model) for model in (ADAPTED, LATE, SCALED)),
    *(("QuirePreempting", model) for model in (ADAPTED, LATE, SCALED)),
    *(("QuireReplicasMissing", model) for model in (PRESSED, LATE)),
}


class Running(NamedTuple):
    application: str
    folder: Path
    prometheus: Prometheus
    users: Users
    stop: Callable[[], None]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    # Ray puts sockets there, whose paths must be short.
    with tempfile.TemporaryDirectory(prefix="qm", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        config = monitored_config(folder)
        server = serving(config, folder, 1, {"RAY_TMPDIR": name})
        url = server.__enter__()
        stopped: list[bool] = []

        def stop() -> None:
            if not stopped:
                stopped.append(True)
                users.stop()
                server.__exit__(None, None, None)

        # Only now: a replica reads what an adapter says of itself when it starts.
        (folder / BROKEN / "adapter_model.safetensors").write_bytes(b"")
        users = Users(url)
        try:
            with scraping(url.removeprefix("http://"), KEY, folder) as watching:
                yield Running(config["applications"][0]["name"], folder, watching, users, stop)
        finally:
            stop()


def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def panels() -> dict[str, str]:
    """The query of each panel, as Grafana would ask with all models, classes and replicas chosen."""
    found = {}
    for path in sorted((MONITORING / "dashboards").iterdir()):
        dashboard: dict[str, Any] = json.loads(path.read_text())
        chosen = {
            variable["name"]: variable.get("allValue") or variable["current"]["value"]
            for variable in dashboard["templating"]["list"]
            if variable["type"] != "datasource"
        }
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                query = target["expr"].replace("$__rate_interval", RATE_INTERVAL)
                for name, value in chosen.items():
                    query = query.replace(f"${name}", value)
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = query
    return found


def test_every_panel_has_data_and_every_variable_values(running: Running) -> None:
    missing = panels()
    assert len(missing) > 50

    def all_there() -> bool:
        for name, query in list(missing.items()):
            if any(map(math.isfinite, running.prometheus.values(query))):
                del missing[name]
        return not missing

    until(all_there, lambda: (missing, running.users.answers))
    models = running.prometheus.label_values("quire_replicas", "model")
    assert models == {ADAPTED, PRESSED, LATE, SCALED}
    classes = running.prometheus.label_values('quire_admission_queued_requests{model=~"late"}', "class")
    assert classes == {"patient", "hasty"}
    assert len(running.prometheus.label_values('quire_engine_steps_total{model=~".*"}', "replica")) == 4


def test_alerts_fire_when_their_fault_is_made(running: Running) -> None:
    watching, application = running.prometheus, running.application
    engines, ingresses = engine_deployment_name(SCALED), INGRESS

    def told(*alerts: str) -> bool:
        return set(alerts) <= {name for name, _ in watching.fired()}

    def stalled() -> bool:
        """A replica is stopped in the middle of its steps; if it was between two requests, once more."""
        pids = processes(application, engines)
        send_signal(pids, signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while not told("QuireEngineStalled") and time.monotonic() < deadline:
            time.sleep(0.5)
        # What is stopped can be killed: its requests go on with its successor.
        send_signal(pids, signal.SIGCONT if not told("QuireEngineStalled") else signal.SIGKILL)
        return told("QuireEngineStalled")

    # The ledger's folder goes away, and no other can be made there; without one no ingress would start again.
    usage = running.folder / USAGE
    usage.rename(running.folder / "moved")
    usage.write_text("")
    until(lambda: told("QuireUsageLedger"), watching.fired)
    usage.unlink()
    usage.mkdir(exist_ok=True)
    until(stalled, watching.fired)
    # What is asked for while nobody answers is not seen by autoscaling.
    until(lambda: told("QuireReplicasMissing"), watching.fired)

    def killed() -> bool:
        """The model's only replica, and one of two ingresses; if they were back too soon for the alert, again."""
        if not told("QuireResubmitting", "QuireModelWithoutReplicas"):
            send_signal(processes(application, engines), signal.SIGKILL)
        if not told("QuireIngressMissing"):
            send_signal(processes(application, ingresses)[:1], signal.SIGKILL)
        time.sleep(8.0)
        return told("QuireResubmitting", "QuireModelWithoutReplicas", "QuireIngressMissing")

    until(killed, watching.fired)
    until(lambda: watching.fired() >= OF_LOAD, lambda: (OF_LOAD - watching.fired(), running.users.answers))
    # A scrape may have gone to the ingress that was killed.
    until(lambda: ("QuireDown", "") not in watching.fired(now=True), watching.fired)
    running.stop()
    until(lambda: ("QuireDown", "") in watching.fired(now=True), watching.fired)
    assert watching.fired() >= OF_LOAD | OF_FAULTS
    assert watching.fired() & NEVER == set()


def test_each_alert_is_made_to_fire_or_said_to_be_not() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    names = {rule["alert"] for group in rules for rule in group["rules"]}
    assert {name for name, _ in OF_LOAD | OF_FAULTS} == names - LEFT_TO_PROMTOOL
    assert names >= LEFT_TO_PROMTOOL
