"""Writes what the figures found: a PNG each, results.json, and a table in Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Figure, Outcome
from engine.errors import ConfigError


class Origin(NamedTuple):
    """How a figure came about: when, by which command, where, and how busy the machine was."""

    date: str
    command: str
    machine: str
    load: float
    wall_s: float

    @classmethod
    def begin(cls, arguments: Sequence[str]) -> Origin:
        """Before the figure runs; it has taken no time yet. `arguments`: the command's, without its output folder."""
        command = shlex.join(["python", "-m", "benchmarks.paper", *arguments])
        now = datetime.datetime.now(datetime.UTC)
        return cls(f"{now:%Y-%m-%d %H:%M} UTC", command, _machine(), round(os.getloadavg()[0], 2), 0.0)


def _machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # no Linux: the architecture has to do
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


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


def as_json(figure: Figure, outcome: Outcome, origin: Origin) -> dict[str, Any]:
    return {
        "title": figure.title,
        "simulated": figure.simulated or None,
        **origin._asdict(),
        "notes": list(outcome.notes),
        "rows": [row.as_json() for row in outcome.rows],
        "data": outcome.data,
    }


def read_results(folder: Path) -> dict[str, Any]:
    """What earlier runs left there, by figure. Raises ConfigError if it is not this command's."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--out {folder}: results.json cannot be added to: {error}") from error
    if not isinstance(results, dict) or not all(isinstance(item, dict) and "rows" in item for item in results.values()):
        raise ConfigError(f"--out {folder}: results.json is not this command's")
    return results


def write_results(folder: Path, results: Mapping[str, Any]) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def write_table(folder: Path, results: Mapping[str, Any]) -> Path:
    path = folder / "results.md"
    sections = [_section(name, result) for name, result in results.items()]
    path.write_text("# The paper's evaluation, redrawn\n\n" + "\n".join(sections), encoding="utf-8")
    return path


def _section(name: str, result: Mapping[str, Any]) -> str:
    where = f"Simulated on {result['simulated']}" if result["simulated"] else "Measured on this machine's CPU"
    began = f"{result['date']}, {result['machine']}, load average {result['load']:.1f} when it began"
    lines = [
        f"## {result['title']} ({name})",
        "",
        f"{where}. `{result['command']}`, {began}; took {result['wall_s']:,.0f} s.",
        "",
        *result["notes"],
        "",
        f"![{name}]({name}.png)",
        "",
        "| what | unit | paper | ours | ratio | note |",
        "|---|---|---|---|---|---|",
        *(_line(row) for row in result["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    paper = "–".join(map(_number, row["paper"])) if isinstance(row["paper"], list) else _number(row["paper"])
    cells = (row["what"], row["unit"], paper, _number(row["ours"]), _number(row["ratio"]), row["note"])
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
