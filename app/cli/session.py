"""One serving session on this machine: start Ray, deploy, show progress, wait, and take all of it down again."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from app.cli.config_file import LoadedConfig, check_ports_are_free
from app.cli.omitting import lines_omitted
from app.cli.processes import descendants, terminate
from app.cli.progress import DeploymentFailedError, StartupView, follow_startup, reason
from app.cli.ray_environment import apply_environment
from app.config import describe
from app.ingress.greeting import curl_line, dialable
from engine.errors import ConfigError

# Small: Quire passes no large objects through Ray. Ray's own default is a third of the machine's memory.
OBJECT_STORE_BYTES = 200 << 20
# Ray starts this many idle workers at once, so little more than what is needed: controller, proxy, build, replicas.
MIN_LOGICAL_CPUS = 4
PROXY_TIMEOUT_S = 60.0
# Serve's controller ends itself while it is asked to: the raylet tells of a task that failed.
_EXPECTED_AT_THE_END = "Task ServeController.graceful_shutdown failed"


def serve_until_stopped(config: LoadedConfig, *, dashboard: bool, logs: bool) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        ConfigError: the port is taken, or Serve refuses the config.
        QuireError: the deployment failed; the message is the replica's own reason.
    """
    check_ports_are_free(config)
    console = Console(highlight=False)
    stop = threading.Event()
    began = time.monotonic()
    with _stop_signals(stop), StartupView(console) as view:
        try:
            with view.phase("starting Ray"):
                _start_ray(config, dashboard=dashboard, logs=logs)
            # Ray has put its own SIGTERM handler in place.
            with _stop_signals(stop):
                with view.phase("starting Serve"):
                    client = _deploy(config)
                follow_startup(client, config, view, stop)
                view.close()
                if not stop.is_set():
                    _announce(console, config, time.monotonic() - began, dashboard=dashboard)
                stop.wait()
        finally:
            view.close()
            with _ignored_signals():
                console.print("[dim]stopping …[/dim]")
                _shut_down()


def _start_ray(config: LoadedConfig, *, dashboard: bool, logs: bool) -> None:
    apply_environment(config)
    import ray

    if not logs:
        _spare_log_monitor()
    threading.Thread(target=_import_serve, name="import-serve", daemon=True).start()
    ray.init(
        # Our own Ray whatever RAY_ADDRESS says: a session takes down what it started, and only that.
        address="local",
        num_cpus=max(MIN_LOGICAL_CPUS, math.ceil(config.num_cpus) + 2),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=dashboard,
        log_to_driver=logs,
        logging_level=logging.INFO if logs else logging.ERROR,
        namespace="serve",
    )


def _spare_log_monitor() -> None:
    """Ray's log monitor reads what workers print, for drivers that show it: here none does. `ray.init` always starts
    it, where `ray start` has a switch."""
    from ray._private.node import Node

    # Private to Ray, whose version is pinned.
    Node.start_log_monitor = lambda _: None  # type: ignore[method-assign]


def _deploy(config: LoadedConfig) -> Any:
    """Hand the file to Serve, as `serve run` does; returns Serve's client.

    Unlike there, the application is built while the HTTP proxy still starts, which saves seconds.
    """
    import ray
    from ray.serve._private import api
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.config import gRPCOptions
    from ray.serve.context import _set_global_client
    from ray.serve.schema import LoggingConfig, ServeDeploySchema

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        schema = ServeDeploySchema.model_validate(config.raw)
    except ValidationError as error:
        raise ConfigError(f"{config.path}: {describe(error, 'config')}") from None
    # Private to Serve, whose version is pinned; typed too narrowly there.
    start_controller: Any = api._create_controller_and_proxy_refs
    controller, proxies_ready = start_controller(
        http_options=schema.http_options.model_dump(),
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
        # Of controller and proxies; the proxies' line for each request must be asked for.
        global_logging_config=schema.logging_config or LoggingConfig(enable_access_log=False),
        global_tracing_config=None,
        controller_options=schema.controller_options,
        proxy_location=schema.proxy_location,
    )
    client = ServeControllerClient(controller)
    _set_global_client(client)  # type: ignore[no-untyped-call]
    client.deploy_apps(schema)
    try:
        ray.get(proxies_ready, timeout=PROXY_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        raise DeploymentFailedError(f"Serve's HTTP proxy did not start: {reason(str(error))}") from None
    return client


def _import_serve() -> None:
    """Serve's modules take two seconds to import; Ray's processes start meanwhile."""
    import ray.serve._private.api
    import ray.serve.schema  # noqa: F401


def _announce(console: Console, config: LoadedConfig, seconds: float, *, dashboard: bool) -> None:
    url = dialable(config.url)
    console.print(f"\n[bold green]Quire is ready[/bold green] at [bold]{url}/v1[/bold] after {seconds:.1f} s")
    for model in config.models:
        names = ", ".join([model.id, *model.aliases])
        asleep = "" if model.deployment.first_replicas else ", no replica runs: the first request starts one"
        console.print(f"  {escape(names)}  [dim]{escape(model.source)}{asleep}[/dim]")
    console.print("\nTry:")
    console.print(f"  {curl_line(url, config.model_ids[0])}", markup=False, soft_wrap=True)
    if dashboard:
        console.print("\nRay's dashboard: http://127.0.0.1:8265")
    console.print("\n[dim]Ctrl-C stops it.[/dim]")


def _shut_down() -> None:
    """Stop Serve, then the Ray that `_start_ray` started, if it got so far."""
    import ray
    from ray import serve

    # HAProxy outlives the actor that started it, and keeps its ports.
    proxies = descendants("haproxy")
    with lines_omitted(_EXPECTED_AT_THE_END):
        if ray.is_initialized():
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()
    terminate(proxies)


@contextmanager
def _stop_signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`, and interrupt what the main thread is doing unless it only waits for them."""

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of handlers
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _ignored_signals() -> Iterator[None]:
    """A second Ctrl-C must not cut the shutdown short and leave processes behind."""
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
