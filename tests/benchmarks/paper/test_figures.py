"""Each figure runs, at a scale far below what its numbers need, and its results are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.paper import __main__ as command
from benchmarks.paper.figure import Context, Figure, Outcome, Row, Scale
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.report import as_json, write_drawing, write_results, write_table

SCALE = Scale(quick=True, duration_s=6.0, rate_shares=(1.0,), real_s=0.01)
FAST = ("fig02", "fig13")


@pytest.fixture
def context() -> Iterator[Context]:
    # In this process: starting others takes longer than these runs.
    with ThreadPoolExecutor(1) as pool:
        yield Context(SCALE, pool)


@pytest.mark.parametrize(
    "figure",
    [pytest.param(item, marks=[] if item.name in FAST else pytest.mark.slow, id=item.name) for item in FIGURES],
)
def test_a_figure_runs_and_is_written(figure: Figure, context: Context, tmp_path: Path) -> None:
    outcome = figure.run(context)
    assert outcome.rows
    assert all(row.ours is None or row.ours >= 0.0 for row in outcome.rows)
    assert write_drawing(tmp_path, figure, outcome).stat().st_size > 5000
    results = {figure.name: as_json(figure, outcome, 1.0)}
    assert json.loads(write_results(tmp_path, results).read_text())[figure.name]["simulated"] == (
        figure.simulated or None
    )
    table = write_table(tmp_path, {figure: outcome}).read_text()
    assert all(row.what in table for row in outcome.rows)
    # What is simulated says so, wherever it is shown.
    assert (f"Simulated on {figure.simulated}" in table) == bool(figure.simulated)


def test_names_are_unique() -> None:
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)


@pytest.mark.parametrize(
    ("ours", "paper", "ratio"),
    [
        (3.0, 2.0, 1.5),
        (3.0, (2.0, 4.0), 1.0),
        (5.0, (2.0, 4.0), 1.25),
        (1.0, (2.0, 4.0), 0.5),
        (None, 2.0, None),
        (1.0, None, None),
    ],
)
def test_ratios(ours: float | None, paper: float | tuple[float, float] | None, ratio: float | None) -> None:
    assert Row("what", "x", ours, paper).ratio == ratio


def test_the_command_ends_with_one_json_object(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("what", "x", 3.0, 2.0)
    figure = Figure("fig99", "Title", lambda _: Outcome([row], {"points": [1]}, ["note"], lambda _: None))
    monkeypatch.setattr(command, "FIGURES", (figure,))
    assert command.main(["--out", str(tmp_path / "new" / "folder"), "--quick", "--jobs", "1"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["figures"] == {"fig99": {"what": {"ours": 3.0, "paper": 2.0, "ratio": 1.5}}}
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {
        "fig99.png",
        "results.json",
        "results.md",
    }


def test_bad_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command.main(["fig02", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert command.main(["fig02", "--out", str(tmp_path), "--trace", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
    for arguments in (["fig99"], ["--jobs", "0"], ["--duration", "0"], ["--duration", "nan"]):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--out", str(tmp_path)])
