"""What tracing costs: CPU time a token of a server that traces, against one that does not.

Two serving sessions of the same config stand side by side, one with an OTLP endpoint; they answer the same requests in
turn, in alternating order. Or, with `--same-session`, one session that traces answers them in turn from clients that
leave it to the server which requests are traced, and from clients who say that theirs are not to be: what remains is
what the traced requests cost, without what two sessions differ in by chance.

Counted is the CPU time of all processes of a session, Ray's included; neither the load generator's nor the collector's,
which takes what comes and throws it away. A run can be cut into pieces: with `--pairs-file` the pairs of earlier pieces
count too. The last line is one JSON object, also of a run that is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import numpy as np

from benchmarks.fleet.server import MODEL, one_model_config, serving
from benchmarks.serving.client import completion_request
from benchmarks.serving.cpu_time import ServerProcesses
from benchmarks.serving.load import Load, run_load

_ENGINE = {"max_num_seqs": 64, "num_blocks": 2048}
_VOCABULARY = range(1000, 30000)
_NOT_SAMPLED = f"00-{'ab' * 16}-{'cd' * 8}-00"


class LoadFailedError(Exception):
    """A request was not answered; the message says why."""


class Workload(NamedTuple):
    """`num_requests` a run, `concurrency` of them at a time."""

    num_requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int


class Arm(NamedTuple):
    """One half of a pair: which session is asked, and whether its clients forbid traces."""

    url: SplitResult
    forbids: bool = False


class Counter(NamedTuple):
    """What the collector got."""

    exports: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(self.exports)


def main() -> None:
    arguments = _arguments()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        del os.environ[name]  # whoever runs this may trace, too
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs are born deaf to SIGINT
        signal.signal(number, signal.default_int_handler)
    workload = Workload(arguments.requests, arguments.concurrency, arguments.prompt_tokens, arguments.output_tokens)
    mode = "against itself" if arguments.against_itself else "same session" if arguments.same_session else "sessions"
    setting = {"device": arguments.device, "sampling": arguments.sampling, "mode": mode, **workload._asdict()}
    pairs = _read_pairs(arguments.pairs_file, setting)
    began = time.monotonic()
    with ExitStack() as stack:
        endpoint, counter = stack.enter_context(_collecting())
        # They start and stop side by side; together they are as slow as one.
        on = {} if arguments.against_itself else _tracing_environment(endpoint, arguments.sampling)
        environments = {"on": on} if arguments.same_session else {"off": {}, "on": on}
        urls = stack.enter_context(_sessions(arguments.device, environments))
        arms = {"off": Arm(urls.get("off", urls["on"]), forbids=arguments.same_session), "on": Arm(urls["on"])}
        for arm in arms.values():
            _cpu_per_token(arm, workload, seed=0)
        exported = counter.num_bytes
        num_before = len(pairs)
        try:
            while len(pairs) < arguments.pairs and time.monotonic() - began < arguments.seconds:
                order = ("off", "on") if len(pairs) % 2 == 0 else ("on", "off")
                pair = {name: _cpu_per_token(arms[name], workload, seed=len(pairs) + 1) for name in order}
                pairs.append(pair)
                _keep_pair(arguments.pairs_file, setting, pair)
                print(f"off {pair['off'] * 1e6:8.1f} us/token   on {pair['on'] * 1e6:8.1f} us/token", flush=True)
        except (KeyboardInterrupt, LoadFailedError) as error:
            # Ctrl-C in a terminal reaches the sessions, too, whose connections may break first.
            print(f"cut off after {len(pairs)} pairs: {error!r}", flush=True)
        num_bytes = (counter.num_bytes - exported) / max(1, (len(pairs) - num_before) * workload.num_requests)
    if pairs:
        print(json.dumps(_summary(pairs, workload, setting, num_bytes)))


def _tracing_environment(endpoint: str, sampling: str) -> dict[str, str]:
    sampler = {"OTEL_TRACES_SAMPLER": "parentbased_always_on"} if sampling == "all" else {}
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, **sampler}


def _read_pairs(path: Path | None, setting: dict[str, Any]) -> list[dict[str, float]]:
    """Pairs of earlier pieces of this run."""
    if path is None or not path.exists():
        return []
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    if other := next((entry["setting"] for entry in entries if entry["setting"] != setting), None):
        sys.exit(f"{path} has pairs of another setting: {other}")
    return [entry["pair"] for entry in entries]


def _keep_pair(path: Path | None, setting: dict[str, Any], pair: dict[str, float]) -> None:
    if path is not None:
        with path.open("a") as file:
            print(json.dumps({"setting": setting, "pair": pair}), file=file)


@contextmanager
def _sessions(device: str, environments: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, SplitResult]]:
    """A serving session for each environment, by its name. They start and stop at the same time."""
    with tempfile.TemporaryDirectory(prefix="quire-tracing-") as folder, ThreadPoolExecutor() as pool:
        contexts = {}
        for name, environment in environments.items():
            (Path(folder) / name).mkdir()
            contexts[name] = serving(one_model_config(device, _ENGINE, 1), Path(folder) / name, environment=environment)
        started = {name: pool.submit(context.__enter__) for name, context in contexts.items()}
        try:
            yield {name: urlsplit(future.result()) for name, future in started.items()}
        finally:
            wait(started.values())
            up = [contexts[name] for name, future in started.items() if future.exception() is None]
            wait([pool.submit(context.__exit__, None, None, None) for context in up])


def _summary(
    pairs: list[dict[str, float]], workload: Workload, setting: dict[str, Any], bytes_a_request: float
) -> dict[str, Any]:
    shares = [pair["on"] / pair["off"] - 1.0 for pair in pairs]
    extra_s = [(pair["on"] - pair["off"]) * workload.output_tokens for pair in pairs]
    return {
        **setting,
        "pairs": len(pairs),
        "cpu_us_per_token_off": round(statistics.mean(pair["off"] for pair in pairs) * 1e6, 2),
        "cpu_us_per_token_on": round(statistics.mean(pair["on"] for pair in pairs) * 1e6, 2),
        "cost_percent": round(100 * statistics.mean(shares), 2),
        "cost_percent_standard_error": _error(shares, 100.0),
        "cost_percent_of_each_pair": [round(100 * share, 2) for share in shares],
        "cpu_us_per_request": round(statistics.mean(extra_s) * 1e6, 1),
        "cpu_us_per_request_standard_error": _error(extra_s, 1e6),
        "exported_bytes_per_request": round(bytes_a_request),
    }


def _error(values: list[float], scale: float) -> float | None:
    return round(scale * statistics.stdev(values) / len(values) ** 0.5, 2) if len(values) > 1 else None


def _cpu_per_token(arm: Arm, workload: Workload, seed: int) -> float:
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
    headers = {"traceparent": _NOT_SAMPLED} if arm.forbids else {}
    payloads = [completion_request(arm.url, body, headers=headers) for body in bodies]
    processes = ServerProcesses(arm.url.port or 80)
    before = processes.seconds()
    records = asyncio.run(run_load(arm.url, Load(payloads, workload.concurrency)))
    seconds = processes.seconds() - before
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        raise LoadFailedError(failed)
    return seconds / sum(record.num_output_tokens for record in records)


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
        "--sampling", choices=["default", "all"], default="default", help="what the server traces if left to itself"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--against-itself", action="store_true", help="trace in neither: what the method finds in nothing"
    )
    which.add_argument(
        "--same-session", action="store_true", help="one session; half of the runs have clients that forbid traces"
    )
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--pairs-file", type=Path, help="where pairs are kept, for the next piece of this run")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no pair after so long")
    parser.add_argument("--requests", type=int, default=32, help="in each run")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
