from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.__main__ import cli
from app.usage.records import encode_line
from app.usage.writer import SEGMENTS
from tests.app.usage.helpers import record, segment


@pytest.fixture
def directory(tmp_path: Path) -> str:
    lines = [record("1", prompt_tokens=1234567), record("2", tenant="bert"), record("3", kind="progress")]
    file = segment(tmp_path / SEGMENTS, "w-000001", b"".join(map(encode_line, lines)))
    file.close(carried=True)
    with file.path.open("ab") as torn:
        torn.write(b"torn\n")
    return str(tmp_path)


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, ["usage", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_a_table(directory: str) -> None:
    code, out, notes = run(directory)
    assert code == 0
    row = next(line.split() for line in out.splitlines() if "acme" in line)
    assert row == ["acme", "tiny", "1", "0", "0", "1,234,567", "4", "5"]
    assert "1 requests still run" in notes
    assert "1 damaged lines" in notes


def test_other_formats_and_days(directory: str) -> None:
    code, out, _ = run(directory, "--format", "json", "--by", "day")
    assert code == 0
    assert json.loads(out)["usage"][0]["day"] == "2026-11-23"
    code, out, _ = run(directory, "--format", "csv", "--until", "2026-11-22")
    assert (code, out) == (0, "tenant,model,requests,unserved,interrupted,prompt_tokens,cached_tokens,output_tokens\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--by", "user"], "'user' is none of"),
        (["--since", "yesterday"], "'yesterday' must be a day"),
        (["--format", "xml"], "'xml' is none of table, json, csv"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(directory: str, arguments: list[str], said: str) -> None:
    code, out, error = run(directory, *arguments)
    assert (code, out) == (1, "")
    assert said in error
    assert error.count("\n") == 1


def test_no_ledger(tmp_path: Path) -> None:
    code, _, error = run(str(tmp_path))
    assert code == 1
    assert "is no usage ledger" in error
