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


@cli.command()
def size(
    config: ConfigPath,
    rate: Annotated[float, typer.Option(help="Requests a second.")],
    prompt_tokens: Annotated[float, typer.Option(help="Of a mean request, those that no cache has.")],
    output_tokens: Annotated[float, typer.Option(help="Of a mean request.")],
    prefill_rate: Annotated[float, typer.Option(help="Prompt tokens a second of a replica, as measured.")],
    step_ms: Annotated[float, typer.Option(help="Of a step, whatever it computes, as measured.")],
    sequence_ms: Annotated[float, typer.Option(help="What each running sequence adds to a step.")] = 0.0,
    overlaps: Annotated[bool, typer.Option(help="Prompts and decodes of a step take the longer of both.")] = False,
    ttft_target: Annotated[float, typer.Option(help="Seconds to the first token, of 95 in 100 requests.")] = 1.0,
    prompt_variation: Annotated[float, typer.Option(help="Variance of prompts' lengths over their mean squared.")] = 1,
    output_variation: Annotated[float, typer.Option(help="Variance of outputs' lengths over their mean squared.")] = 1,
    held_prompt_tokens: Annotated[float | None, typer.Option(help="If prefixes are cached: whole prompts.")] = None,
    max_seat_share: Annotated[float, typer.Option(help="No fuller are seats and KV blocks to be.")] = 0.75,
    num_blocks: Annotated[int | None, typer.Option(help="KV blocks of a replica, if the config leaves them.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of the config's models, if it has several.")] = None,
) -> None:
    """Foresee how many replicas a traffic needs, from the pace that `python -m benchmarks.capacity` measures."""
    from app.autoscaling.capacity import Pace, Traffic, capacity, foresee, replicas_for
    from app.cli.config_file import load_config
    from app.cli.sizing import replica_limits

    try:
        limits = replica_limits(load_config(config), model, num_blocks)
        pace = Pace(prefill_rate, step_ms / 1e3, sequence_ms / 1e3, overlaps)
        traffic = Traffic(rate, prompt_tokens, output_tokens, held_prompt_tokens, prompt_variation, output_variation)
        number = replicas_for(pace, limits, traffic, ttft_target, max_seat_share)
        found = foresee(pace, limits, traffic, number)
        most = capacity(pace, limits, traffic, number, ttft_target)
    except QuireError as error:
        _fail(error)
    plural = "" if number == 1 else "s"
    typer.echo(f"{number} replica{plural}, and one more if the loss of one is to go unnoticed")
    typer.echo(f"first token {found.ttft_p95_s:.2f} s at p95, {1e3 * found.tpot_s:.0f} ms a token")
    typer.echo(f"{found.running:.1f} requests run on each, {100 * found.seat_share:.0f} % of its seats")
    typer.echo(f"the target is kept up to {most:.2f} requests a second")


def _fail(error: QuireError) -> None:
    # No markup: a message may hold brackets, such as `models[0]`.
    _console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    cli()
