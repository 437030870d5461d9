"""`python -m app serve CONFIG`, which `make serve` runs, and the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine.errors import QuireError

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_console = Console(stderr=True, highlight=False)

ConfigPath = Annotated[Path, typer.Argument(help="A Serve config in YAML, e.g. serve_configs/quickstart.yaml.")]


@cli.command()
def serve(
    config: ConfigPath,
    dashboard: Annotated[bool, typer.Option(help="Also start Ray's dashboard on 127.0.0.1:8265.")] = False,
    logs: Annotated[bool, typer.Option(help="Print the replicas' logs here.")] = False,
) -> None:
    """Serve a config on this machine until Ctrl-C."""
    # Imported here, so that `--help` and errors in the config do not wait for Ray.
    from app.cli.config_file import load_config

    try:
        loaded = load_config(config)
        from app.cli.libraries import check_libraries

        check_libraries()
        from app.cli.session import serve_until_stopped

        serve_until_stopped(loaded, dashboard=dashboard, logs=logs)
    except QuireError as error:
        _fail(error)


@cli.command()
def check(config: ConfigPath) -> None:
    """Check a config without starting anything."""
    from app.cli.config_file import load_config

    try:
        loaded = load_config(config)
    except QuireError as error:
        _fail(error)
    _console.print(f"{config} is sound: {', '.join(loaded.model_ids)}")


@cli.command()
def environment(config: ConfigPath) -> None:
    """Print what to export before `ray start` on every node, for a cluster that serves the config."""
    from app.cli.config_file import load_config

    try:
        loaded = load_config(config)
        from app.cli.ray_environment import export_lines

        typer.echo("\n".join(export_lines(loaded)))
    except QuireError as error:
        _fail(error)


@cli.command()
def usage(
    where: Annotated[str, typer.Argument(help="A usage ledger: its directory, or s3://BUCKET/PREFIX.")],
    since: Annotated[str | None, typer.Option(help="The first day (UTC), like 2026-11-01.")] = None,
    until: Annotated[str | None, typer.Option(help="The last day, included.")] = None,
    by: Annotated[str | None, typer.Option(help="Some of day,tenant,model,adapter; tenant,model if left out.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, json or csv.")] = "table",
) -> None:
    """Print who used which model how much."""
    from app.cli.usage import print_usage

    try:
        print_usage(where, since=since, until=until, by=by, form=form, notes=_console)
    except QuireError as error:
        _fail(error)


def _fail(error: QuireError) -> None:
    # No markup: a message may hold brackets, such as `models[0]`.
    _console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    cli()
