"""Only the thin adapters know Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("folder", "adapter"), [("app/balancer", "router.py"), ("app/transport", "cluster_secret.py")])
def test_only_one_file_imports_ray(folder: str, adapter: str) -> None:
    modules = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.name != adapter
    ]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
