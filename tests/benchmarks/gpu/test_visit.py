"""A visit to a GPU machine, without the machine: limits, what is passed on, and what a step that hangs costs."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.visit import Step, library_step, main, run_step, steps_of

STAGES = (1, 2, 3, 4)


def test_every_part_is_in_some_stage_and_the_steps_are_files_that_exist() -> None:
    commands = [list(step.command) for stage in STAGES for step in steps_of(stage)]
    words = {word for command in commands for word in command}
    assert set(PARTS) <= words
    for word in words:
        if word.startswith("tests/"):
            assert (Path(__file__).parents[3] / word).exists(), word


@pytest.mark.parametrize("stage", STAGES)
def test_limits_leave_the_first_steps_of_a_stage_all_their_time(stage: int) -> None:
    limits = [step.limit_s for step in steps_of(stage)]
    assert sum(limits[:-1]) < 570


def test_a_step_passes_on_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "print('table'); print('= a: 1 (met)'); print('{\"x\": 1}'); print('{\"x\": 2}'); print('3 passed in 1s')"
    result = run_step(Step("one", [sys.executable, "-c", code], 60), time.monotonic() + 60, dict(os.environ), tmp_path)
    assert result.pop("seconds") >= 0
    assert result == {
        "step": "one",
        "ended": "0",
        "json": {"x": 2},
        "figures": ["a: 1 (met)"],
        "tests": "3 passed in 1s",
    }
    printed = capsys.readouterr().out
    assert "table" in printed
    assert '{"x"' not in printed, "the summary has it"
    assert '{"x": 1}' in (tmp_path / "one.log").read_text()


def test_a_step_that_hangs_is_cut_off_with_its_children_and_keeps_what_it_printed() -> None:
    code = "echo '{\"x\": 1}'; sleep 60 & sleep 60"
    began = time.monotonic()
    result = run_step(Step("slow", ["sh", "-c", code], 2), began + 60, dict(os.environ), None)
    assert time.monotonic() - began < 30
    assert result["ended"] == "cut off after 2 s"
    assert result["json"] == {"x": 1}


def test_steps_are_left_out_for_want_of_time_or_of_a_program() -> None:
    now = time.monotonic()
    assert "time is over" in run_step(Step("late", ["true"], 9), now + 1, {}, None)["ended"]
    assert "there is no quire-none" in run_step(Step("tool", ["true"], 9, "quire-none"), now + 60, {}, None)["ended"]
    assert "could not be started" in run_step(Step("gone", ["./quire-none"], 9), now + 60, {}, None)["ended"]


def test_a_library_that_was_brought_along_is_not_built(tmp_path: Path) -> None:
    environment = {"QUIRE_LIBRARY_PATH": str(tmp_path)}
    step = library_step(environment)
    assert step is not None
    assert "QUIRE_CUDA=ON" in step.command[-1]
    (tmp_path / "libquire_cuda.so").touch()
    assert library_step(environment) is None


def test_a_stage_ends_in_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("benchmarks.gpu.visit.library_step", lambda _: None)
    monkeypatch.setattr("benchmarks.gpu.visit.steps_of", lambda _: [Step("a", ["false"], 9), Step("b", ["true"], 9)])
    main(["2"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["stage"] == 2
    assert [(step["step"], step["ended"]) for step in summary["steps"]] == [("a", "1"), ("b", "0")]
