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
from benchmarks.paper.report import Origin, as_json, write_drawing, write_results, write_table

SCALE = Scale(quick=True, duration_s=6.0, rate_shares=(1.0,), real_s=0.01)
ORIGIN = Origin("2026-11-22 10:00 UTC", "python -m benchmarks.paper fig99", "a machine", 0.5, 1.0)
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
    results = {figure.name: as_json(figure, outcome, ORIGIN)}
    assert json.loads(write_results(tmp_path, results).read_text())[figure.name]["simulated"] == (
        figure.simulated or None
    )
    table = write_table(tmp_path, results).read_text()
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


def test_figures_of_earlier_runs_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def figure(name: str, value: float) -> Figure:
        return Figure(name, name, lambda _: Outcome([Row("what", "x", value, 2.0)], {}, [], lambda _: None))

    for figures in ((figure("fig98", 1.0),), (figure("fig99", 5.0), figure("fig98", 3.0))):
        monkeypatch.setattr(command, "FIGURES", figures)
        assert command.main([figures[0].name, "--out", str(tmp_path), "--quick", "--jobs", "1"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(name, item["rows"][0]["ours"]) for name, item in results.items()] == [("fig99", 5.0), ("fig98", 1.0)]
    assert results["fig99"]["command"] == "python -m benchmarks.paper fig99 --quick"
    assert "fig98.png" in (tmp_path / "results.md").read_text()


def test_foreign_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("[1]")
    assert command.main(["fig02", "--out", str(tmp_path), "--quick", "--jobs", "1"]) == 2
    assert "results.json is not" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "[1]"


def test_bad_arguments_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert command.main(["fig02", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert command.main(["fig02", "--out", str(tmp_path), "--trace", str(tmp_path / "none.csv")]) == 2
    assert "none.csv" in capsys.readouterr().err
    for arguments in (["fig99"], ["--jobs", "0"], ["--duration", "0"], ["--duration", "nan"]):
        with pytest.raises(SystemExit):
            command.main([*arguments, "--out", str(tmp_path)])
