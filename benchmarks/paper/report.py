"""Writes what the figures found: a PNG each, results.json, and a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Figure, Outcome, Row
from engine.errors import ConfigError


def prepare_folder(folder: Path) -> None:
    """Make sure that results can be written before hours of work rather than after. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written to: {error}") from error


def write_drawing(folder: Path, figure: Figure, outcome: Outcome) -> Path:
    drawing = Drawing(layout="constrained")
    FigureCanvasAgg(drawing)
    outcome.draw(drawing)
    origin = f"SIMULATED on {figure.simulated}" if figure.simulated else "measured on this machine's CPU"
    drawing.suptitle(f"{figure.title} ({origin})")
    path = folder / f"{figure.name}.png"
    drawing.savefig(path, dpi=130)
    return path


def as_json(figure: Figure, outcome: Outcome, wall_s: float) -> dict[str, Any]:
    return {
        "title": figure.title,
        "simulated": figure.simulated or None,
        "wall_s": round(wall_s, 1),
        "notes": list(outcome.notes),
        "rows": [row.as_json() for row in outcome.rows],
        "data": outcome.data,
    }


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def write_table(folder: Path, outcomes: Mapping[Figure, Outcome]) -> Path:
    path = folder / "results.md"
    sections = [_section(figure, outcome) for figure, outcome in outcomes.items()]
    path.write_text("# The paper's evaluation, redrawn\n\n" + "\n".join(sections), encoding="utf-8")
    return path


def _section(figure: Figure, outcome: Outcome) -> str:
    origin = f"Simulated on {figure.simulated}." if figure.simulated else "Measured on this machine's CPU."
    lines = [
        f"## {figure.title} ({figure.name})",
        "",
        origin,
        *outcome.notes,
        "",
        f"![{figure.name}]({figure.name}.png)",
    ]
    lines += ["", "| what | unit | paper | ours | ratio | note |", "|---|---|---|---|---|---|"]
    lines += [_line(row) for row in outcome.rows]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    paper = "–".join(map(_number, row.paper)) if isinstance(row.paper, tuple) else _number(row.paper)
    return f"| {row.what} | {row.unit} | {paper} | {_number(row.ours)} | {_number(row.ratio)} | {row.note} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
