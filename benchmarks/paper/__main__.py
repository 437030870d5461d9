"""Redraws the figures of the PagedAttention paper (arXiv 2309.06180) with Quire's engine.

    python -m benchmarks.paper [figure ...] --out DIR [--trace FILE] [--quick] [--duration SECONDS]

Without figures, all of them. Each becomes DIR/NAME.png; DIR/results.json has the data, DIR/results.md a table with the
paper's values beside ours; figures that DIR has already and that are not asked for stay as they are. What ran on a
simulated device says so. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.paper.figure import FULL, QUICK, Context, Figure, Outcome, make_context
from benchmarks.paper.figures import FIGURES
from benchmarks.paper.report import (
    Origin,
    as_json,
    prepare_folder,
    read_results,
    write_drawing,
    write_results,
    write_table,
)
from engine.errors import QuireError


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    figures = [figure for figure in FIGURES if not options.figures or figure.name in options.figures]
    try:
        prepare_folder(options.out)
        read_results(options.out)
        # Spawned, not forked: torch and its threads may be loaded already.
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            scale = QUICK if options.quick else FULL
            if options.duration is not None:
                scale = dataclasses.replace(scale, duration_s=options.duration)
            context = make_context(scale, pool, options.trace)
            summary = _run(figures, context, options)
    except QuireError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [figure.name for figure in FIGURES]
    parser.add_argument("figures", nargs="*", metavar="figure", help=", ".join(names))
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made if missing")
    parser.add_argument("--trace", type=Path, help="a trace whose lengths take the place of the ShareGPT-shaped ones")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, and rougher")
    parser.add_argument(
        "--duration", type=float, help=f"simulated seconds of arrivals for each point, {FULL.duration_s:g} unless quick"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that simulate")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.figures) - set(names))
    if unknown:
        parser.error(f"unknown figure {', '.join(unknown)}; known: {', '.join(names)}")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    if options.duration is not None and not 1.0 <= options.duration <= 86400.0:
        parser.error(f"--duration {options.duration} must be from 1 to 86400 seconds")
    return options


def _run(figures: list[Figure], context: Context, options: argparse.Namespace) -> dict[str, object]:
    outcomes: dict[Figure, Outcome] = {}
    folder = options.out
    for figure in figures:
        origin = Origin.begin(_how(figure, options))
        begin = time.perf_counter()
        outcome = outcomes[figure] = figure.run(context)
        origin = origin._replace(wall_s=round(time.perf_counter() - begin, 1))
        path = write_drawing(folder, figure, outcome)
        # After each figure: hours of work are not lost to the last one's failure, nor another run's to this one.
        results = read_results(folder)
        results[figure.name] = as_json(figure, outcome, origin)
        order = [item.name for item in FIGURES]
        results = dict(sorted(results.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1))
        write_results(folder, results)
        table = write_table(folder, results)
        print(f"{figure.name}: {path} ({origin.wall_s:.0f} s)", flush=True)
    print(table.read_text(encoding="utf-8"))
    rows = {
        figure.name: {row.what: {"ours": row.ours, "paper": row.paper, "ratio": row.ratio} for row in outcome.rows}
        for figure, outcome in outcomes.items()
    }
    simulated = {figure.name: figure.simulated or None for figure in figures}
    return {"benchmark": "paper", "quick": context.scale.quick, "simulated": simulated, "figures": rows}


def _how(figure: Figure, options: argparse.Namespace) -> list[str]:
    """The arguments that make this figure alone."""
    arguments = [figure.name]
    if options.trace is not None:
        arguments += ["--trace", options.trace.name]
    if options.quick:
        arguments.append("--quick")
    if options.duration is not None:
        arguments += ["--duration", f"{options.duration:g}"]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
