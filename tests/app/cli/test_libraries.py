"""A library of another version is refused before Ray starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.cli.libraries import check_libraries

QUICKSTART = "serve_configs/quickstart.yaml"


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a balancer's core that says it is of version 0."""
    source = tmp_path / "stale.c"
    source.write_text("int quire_balancer_abi_version(void) { return 0; }\n")
    library = tmp_path / "libquire_balancer.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    monkeypatch.setenv("QUIRE_LIBRARY_PATH", str(tmp_path))
    return library


def test_a_stale_library_ends_the_start_at_once(stale: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not_start(*_arguments: object, **_options: object) -> None:
        raise AssertionError("Ray would have been started")

    monkeypatch.setattr("app.cli.session.serve_until_stopped", must_not_start)
    result = CliRunner().invoke(cli, ["serve", QUICKSTART])
    assert result.exit_code == 1
    assert f"{stale} has ABI version 0" in result.output


def test_libraries_that_are_not_there_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_LIBRARY_PATH", str(tmp_path))
    check_libraries()
