"""What `python -m app usage` prints: a ledger's totals as a table, JSON or CSV."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from app.usage.report import Row, Usage, as_csv, as_json, read_usage, rows
from app.usage.totals import COUNTS
from engine.errors import ConfigError

FORMATS = ("table", "json", "csv")

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")
_MAX_WIDTH = 500
_GROUPS_SHOWN = "tenant,model"


def print_usage(where: str, *, since: str | None, until: str | None, by: str | None, form: str, notes: Console) -> None:
    """Print usage to standard output; what is not in it goes to `notes`.

    Raises:
        QuireError: there is no ledger, S3 refuses, or an option is no day, no group or no format.
    """
    for option, day in (("--since", since), ("--until", until)):
        if day is not None and not _DAY.fullmatch(day):
            raise ConfigError(f"{option}: {day!r} must be a day like 2026-11-23")
    if form not in FORMATS:
        raise ConfigError(f"--format: {form!r} is none of {', '.join(FORMATS)}")
    groups = (by or _GROUPS_SHOWN).split(",")
    rows(Usage(), groups)
    usage = read_usage(where)
    found = rows(usage, groups, since or "", until or "9999")
    if form == "json":
        typer.echo(as_json(groups, found, usage))
        return
    if form == "csv":
        typer.echo(as_csv(groups, found), nl=False)
    else:
        # As wide as it must be: a number that is cut short would be wrong.
        Console(highlight=False, width=_MAX_WIDTH).print(_table(groups, found))
    if usage.num_open:
        notes.print(f"{usage.num_open} requests still run and are not in this")
    if usage.num_damaged:
        notes.print(f"{usage.num_damaged} damaged lines are not in this", style="yellow")


def _table(by: Sequence[str], found: Iterable[Row]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in by:
        table.add_column(name, no_wrap=True)
    for name in COUNTS:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for group, counts in found:
        table.add_row(*group, *(f"{getattr(counts, name):,}" for name in COUNTS))
    return table
