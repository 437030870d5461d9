"""A real Prometheus with the repository's own configuration, its minutes shortened to seconds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

from benchmarks.fleet.server import free_port
from tests.infra.promtool import UNPACKED

prometheus = shutil.which("prometheus") or shutil.which("prometheus", path=str(UNPACKED))

MONITORING = Path(__file__).parents[2] / "infra" / "monitoring"
# A scrape may take as long, on a machine that does much else besides.
SCRAPE_INTERVAL = "2s"
# A minute of `for` is a second; one of a window is longer, so that one fault is seen for as long as that.
_WINDOW_S_PER_MINUTE = 6
# As Grafana would have it for panels of a short time.
RATE_INTERVAL = "20s"
_START_TIMEOUT_S = 60.0
_WINDOW = re.compile(r"(?<=\[)(\d+)m(?=\])")
_FOR = re.compile(r"(?<= for: )(\d+)m$", re.MULTILINE)


def shortened(rules: str) -> str:
    """A file of rules in which minutes are seconds, six of them in a window; nothing else is changed."""
    rules = _WINDOW.sub(lambda found: f"{int(found[1]) * _WINDOW_S_PER_MINUTE}s", rules)
    return _FOR.sub(r"\1s", rules)


def config_for(target: str, key_file: Path, rules: Path) -> dict[str, Any]:
    """prometheus.yaml with another target, key and interval."""
    config: dict[str, Any] = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    config["rule_files"] = [str(rules)]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(key_file)
    job["static_configs"] = [{"targets": [target]}]
    return config


class Prometheus:
    """A running one.

    Attributes:
        began_s: Unix time of its start.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.began_s = time.time()

    def values(self, query: str) -> list[float]:
        """Of all series of a query, at any second since the start."""
        result = self._ask("query_range", query=query, start=self.began_s, end=time.time(), step=1)["result"]
        return [float(value) for series in result for _, value in series["values"]]

    def fired(self, *, now: bool = False) -> set[tuple[str, str]]:
        """Alerts that have fired, or do so `now`, each with its model, empty if it is of none."""
        query = 'ALERTS{alertstate="firing"}' + ("" if now else "[1h]")
        return {
            (series["metric"]["alertname"], series["metric"].get("model", ""))
            for series in self._ask("query", query=query)["result"]
        }

    def label_values(self, series: str, label: str) -> set[str]:
        """As Grafana asks for a variable's."""
        query = urlencode({"match[]": series})
        with urlopen(f"{self.url}/api/v1/label/{label}/values?{query}", timeout=30) as response:
            return set(json.load(response)["data"])

    def _ask(self, kind: str, **parameters: Any) -> dict[str, Any]:
        with urlopen(f"{self.url}/api/v1/{kind}?{urlencode(parameters)}", timeout=30) as response:
            return dict(json.load(response)["data"])


@contextmanager
def scraping(target: str, key: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus reads `target` and evaluates the alerts until the body ends; what it keeps is in `folder`."""
    assert prometheus is not None
    rules, key_file, file = folder / "alerts.yaml", folder / "key", folder / "prometheus.yaml"
    rules.write_text(shortened((MONITORING / "alerts.yaml").read_text()))
    key_file.write_text(key)
    file.write_text(yaml.safe_dump(config_for(target, key_file, rules)))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        _wait_until_ready(process, f"http://{address}", folder / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.kill()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            with urlopen(f"{url}/-/ready", timeout=5):
                return
        except (URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.1)
