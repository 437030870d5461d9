from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.yaml_file import read_yaml
from engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no valid YAML in line 1"),
        ("- a", "must hold a mapping"),
        ("a: 1\nb: {c: 1, d: 2}\na: 2\n", "no valid YAML in line 3: 'a' twice"),
        ("a:\n  - {b: 1, c: 2,\n     b: 3}\n", "no valid YAML in line 3: 'b' twice"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_anchors_may_be_merged_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nmade: {<<: *base, b: 3}\n")
    assert read_yaml(path)["made"] == {"a": 1, "b": 3}
