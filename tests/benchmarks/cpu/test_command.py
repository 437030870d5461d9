"""`python -m benchmarks.cpu` as a whole, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cpu import __main__ as command
from benchmarks.cpu.machine import MachineRates
from benchmarks.cpu.peers import EngineRun, ratios, read_peer
from engine.errors import ConfigError

TINY = ["--model", "dummy:tiny", "--num-requests", "4", "--runs", "2", "--context", "30", "--steps", "3"]
SMALL = [f"--engine-option={option}" for option in ("max_model_len=256", "num_blocks=64", "num_threads=1")]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measure_machine", lambda _: [MachineRates(1, 1e10, {"float32": 1e11, "int8": 2e11})])


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, object], str]:
    command.main([*TINY, *SMALL, "--batches", "1", "3", *arguments])
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert isinstance(last, dict)
    return last, out


def test_the_last_line_has_what_peers_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = tmp_path / "peer.json"
    figures = {"peer": "other", "out_tok_s": [2.0, 1.0, 4.0], "single_tok_s": 0.5, "load_s": None}
    peer.write_text(f"INFO loading\n{json.dumps(figures)}\n")
    result, out = run(["--peer", str(peer), "--write-requests", str(tmp_path / "list.json")], capsys)
    ours = EngineRun("quire", result["out_tok_s"], [result["single_tok_s"]], result["load_s"])  # type: ignore[arg-type, list-item]
    assert len(ours.out_tok_s) == 2
    assert result["ratios"] == ratios(ours, [read_peer(peer)])
    assert result["batch_phases"]["roofline_ratio"] > 0  # type: ignore[index]
    decode = result["decode"]
    assert isinstance(decode, list)
    assert [case["batch"] for case in decode] == [1, 3]
    assert all(case["step_ms"] > 0 and 0 < case["python_share"] < 1 for case in decode)
    for text in ("other", "sampling", "python", "between steps", "decode step, 3 x 30"):
        assert text in out
    result, _ = run(["--requests", str(tmp_path / "list.json")], capsys)
    assert result["requests"] == "list.json"


def test_a_busy_core(capsys: pytest.CaptureFixture[str]) -> None:
    result, out = run(["--busy-loop"], capsys)
    assert result["busy_loop"]["ratio"] > 0  # type: ignore[index]
    assert "with a busy loop on core" in out


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for arguments in (
        ["--runs", "0"],
        ["--engine-option", "dtype"],
        ["--requests", str(tmp_path), "--write-requests", str(tmp_path)],
    ):
        with pytest.raises(SystemExit):
            command.main(arguments)
    with pytest.raises(ConfigError, match="unknown engine option colour"):
        command.main([*TINY, "--engine-option", "colour=red"])


@pytest.mark.parametrize(
    ("text", "message"),
    [("INFO\n", "no line of it"), ('{"peer": "x", "out_tok_s": [1]}', "lacks single_tok_s")],
)
def test_a_peers_output_without_its_figures_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "peer.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_peer(tmp_path / "peer.json")
