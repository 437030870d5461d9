"""Prometheus' own checker, from PATH or from where .ci/run puts it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

UNPACKED = Path(__file__).parents[2] / "build" / "prometheus" / "usr" / "bin"
promtool = shutil.which("promtool") or shutil.which("promtool", path=str(UNPACKED))
needs_promtool = pytest.mark.skipif(
    promtool is None, reason="promtool is missing: neither on PATH nor in build/prometheus, where .ci/run unpacks it"
)


def complaints(*arguments: str | Path, stdin: str = "") -> str:
    """What promtool says against its arguments; empty if it accepts them."""
    assert promtool is not None
    run = subprocess.run(
        [promtool, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    return "" if run.returncode == 0 else run.stdout + run.stderr
