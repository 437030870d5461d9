"""docs/structure.md names every source file, and no file that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def test_every_source_file_is_described() -> None:
    described: set[Path] = set()
    folder = Path()
    for line in (ROOT / "docs" / "structure.md").read_text().splitlines():
        if heading := re.fullmatch(r"### (\S+)/", line):
            folder = Path(heading[1])
        elif row := re.match(r"\| `([^`]+)` \| \S", line):
            described.add(folder / row[1])
    present = {
        path.relative_to(ROOT)
        for top in ("app", "engine", "csrc", "benchmarks")
        for path in (ROOT / top).rglob("*")
        if path.suffix in SUFFIXES
    }
    undescribed = {path for path in present - described if path.name != "__init__.py"}
    assert not undescribed, f"add a line to docs/structure.md for {sorted(map(str, undescribed))}"
    gone = {path for path in described if not (ROOT / path).exists()}
    assert not gone, f"docs/structure.md describes {sorted(map(str, gone))}, which do not exist"
