from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.routing import __main__ as command
from benchmarks.routing.devices import Prices, named_device, priced_device
from benchmarks.routing.stepping import SteppingModel
from engine.errors import ConfigError
from engine.execution.simulated_step_time import StepWork

LINE = {"timestamp": 0, "input_length": 3000, "output_length": 20, "hash_ids": [0, 1, 2, 3, 4, 5]}


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({**LINE, "timestamp": 10 * number}) + "\n" for number in range(5)))
    arguments = ["--trace", str(trace), "--replicas", "2", "--policy", "cheapest", *options]
    monkeypatch.setattr(sys, "argv", ["benchmarks.routing", *arguments])
    command.main()


def test_prices_are_those_of_its_steps() -> None:
    model = priced_device(10, Prices(1000.0, 0.02), "dummy:llama-3.1-8b").model
    assert isinstance(model, SteppingModel)
    assert model.steps.seconds(StepWork(1, 1, 1, 9, 9)) == pytest.approx(0.02)
    assert model.steps.seconds(StepWork(1, 1000, 0, 1000, 500_000)) == pytest.approx(1.0)


def test_a_device_is_of_the_table_or_this_machine() -> None:
    assert "H200" in named_device(10, "H200", "dummy:llama-3.1-8b").source
    assert "fitted to" in named_device(10, "cpu", "dummy:tiny").source
    with pytest.raises(ConfigError, match="abacus"):
        named_device(10, "abacus", "dummy:tiny")


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "fixed", "--prefill-rate", "6000", "--tpot-ms", "20"),
        ("--model", "fitted", "--prefill-rate", "6000", "--tpot-ms", "20"),
        ("--model", "fitted", "--device", "A100-40GB"),
    ],
)
def test_the_command_prints_its_results_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    run(monkeypatch, tmp_path, *options)
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    entry = results["policies"]["cheapest"]
    assert results["model"] == options[1]
    assert entry["requests"] == 5
    assert entry["ttft_mean_s"] > 0.0
    assert entry["tpot_p99_s"] > 0.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--device", "h200"), "they need --model fitted"),
        (("--model", "fitted", "--device", "abacus"), "'abacus' is none of cpu, a100-40gb"),
        (("--model", "fitted", "--device", "h200", "--tpot-ms", "3"), "--tpot-ms do so without it"),
        (("--tpot-ms", "0"), "--tpot-ms: must be positive"),
    ],
)
def test_what_does_not_go_together_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    complaint: str,
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, *options)
    assert complaint in capsys.readouterr().err
