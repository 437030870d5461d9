"""The capacity formula against a real server: measures a replica's pace, foresees how many requests a second keep the
first token's target, and then offers rates around that to see where it breaks.

A serving session of its own: `--replicas` of SmolLM2 on this CPU, or on a simulated device, whose pace is known. Two
closed loops measure the pace: one stream, and as many as there are seats. Then an open loop of Poisson arrivals for
each of `--multiples` of the foreseen rate. A rate is kept if the first tokens of 95 in 100 requests came within the
target; where it breaks lies between two of the rates, by their p95. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import numpy as np

from app.autoscaling.capacity import Pace, ReplicaLimits, Traffic, capacity, foresee
from benchmarks.cpu.options import positive
from benchmarks.fleet.server import MODEL, one_model_config, serving
from benchmarks.serving.client import StreamRecord, completion_request
from benchmarks.serving.load import Load, run_load
from benchmarks.serving.workload import poisson_due
from engine.execution.simulated_device import PREFIX, FixedPrices, parse_simulated

_BLOCK_SIZE = 16
_NUM_BLOCKS = 4096
_STEP_TOKENS = 2048
_VOCABULARY = range(1000, 30000)
_ITERATIONS = 50


class Closed(NamedTuple):
    """A closed loop: medians, and requests a second."""

    ttft_s: float
    tpot_s: float
    requests_per_s: float


class Offered(NamedTuple):
    """An open loop at one rate: what was foreseen for it, and what came."""

    rate: float
    num_requests: int
    foreseen_ttft_p95_s: float
    ttft_p95_s: float
    foreseen_tpot_s: float
    tpot_s: float


def main() -> None:
    options = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    limits = ReplicaLimits(options.max_num_seqs, _NUM_BLOCKS, _BLOCK_SIZE, _STEP_TOKENS)
    traffic = Traffic(1.0, options.prompt_tokens, options.output_tokens, prompt_variation=0.0, output_variation=0.0)
    with (
        tempfile.TemporaryDirectory(prefix="quire-capacity-") as folder,
        serving(_config(options), Path(folder)) as root,
    ):
        url = urlsplit(root)
        _run(url, options, 2 * options.replicas, [])  # what is paid once
        pace = _pace(url, options)
        print(f"pace: {pace}", flush=True)
        foreseen = capacity(pace, limits, traffic, options.replicas, options.ttft_target)
        print(f"foreseen: {foreseen:.2f} requests/s keep {options.ttft_target:g} s", flush=True)
        offered = [
            _offer(url, options, pace, limits, traffic._replace(requests_per_s=foreseen * multiple))
            for multiple in sorted(options.multiples)
        ]
    measured = broken_at(offered, options.ttft_target)
    result = {
        "benchmark": "capacity",
        **{name: getattr(options, name) for name in ("device", "replicas", "max_num_seqs", "ttft_target")},
        "prompt_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
        "pace": pace._asdict(),
        "foreseen_requests_per_s": round(foreseen, 3),
        "measured_requests_per_s": None if measured is None else round(measured, 3),
        "error_percent": None if measured is None else round(100 * (foreseen / measured - 1), 1),
        "offered": [each._asdict() for each in offered],
    }
    print(json.dumps(result).replace("Infinity", "null"))


def broken_at(offered: Sequence[Offered], target_s: float) -> float | None:
    """The rate at which p95 crosses the target, between the last rate that kept it and the next; None if none broke it,
    or all did.
    """
    for kept, broken in itertools.pairwise(offered):
        if kept.ttft_p95_s <= target_s < broken.ttft_p95_s:
            share = (target_s - kept.ttft_p95_s) / (broken.ttft_p95_s - kept.ttft_p95_s)
            return kept.rate + share * (broken.rate - kept.rate)
    return None


def pace_of(one: Closed, many: Closed, concurrency: float, prompt_tokens: int, output_tokens: int) -> Pace:
    """What steps take, from one stream and from several; the latter's requests a second are of one replica.

    A replica that is never idle takes for each request its prompt's time, and of each of its tokens' steps the share of
    one sequence in so many. How long their tokens took would not do: streams of one length begin and end together, so
    that prompts hold up none of them. The first token of a single stream takes a prompt and a step of no other.
    """
    prompt_s = sequence_s = 0.0
    for _ in range(_ITERATIONS):
        many_s = max(0.0, 1.0 / many.requests_per_s - prompt_s) * concurrency / output_tokens
        sequence_s = max(0.0, (many_s - one.tpot_s) / (concurrency - 1))
        step_s = max(one.tpot_s / 10, one.tpot_s - sequence_s)
        prompt_s = max(one.ttft_s / 100, one.ttft_s - step_s)
    return Pace(prompt_tokens / prompt_s, step_s, sequence_s)


def _pace(url: SplitResult, options: argparse.Namespace) -> Pace:
    if options.device.startswith(PREFIX):
        prices = parse_simulated(options.device)
        if not isinstance(prices, FixedPrices):
            raise SystemExit(f"--device={options.device}: its pace depends on the model; give prefill= and step_ms=")
        return Pace(prices.prefill_tokens_per_s, prices.step_s, overlaps=True)
    concurrency = max(2, options.max_num_seqs)
    one = _closed(url, options, 1, 6)
    many = _closed(url, options, concurrency * options.replicas, 4 * concurrency * options.replicas)
    many = many._replace(requests_per_s=many.requests_per_s / options.replicas)
    print(f"one stream: {one}; {concurrency} on a replica: {many}", flush=True)
    return pace_of(one, many, concurrency, options.prompt_tokens, options.output_tokens)


def _closed(url: SplitResult, options: argparse.Namespace, concurrency: int, num_requests: int) -> Closed:
    began = time.perf_counter()
    records = _run(url, options, num_requests, [], concurrency)
    seconds = time.perf_counter() - began
    return Closed(
        statistics.median(record.ttft_s for record in records),
        statistics.median(record.tpot_s or 0.0 for record in records),
        num_requests / seconds,
    )


def _offer(
    url: SplitResult, options: argparse.Namespace, pace: Pace, limits: ReplicaLimits, traffic: Traffic
) -> Offered:
    rate = traffic.requests_per_s
    due_s = poisson_due(max(20, round(rate * options.seconds)), rate, options.seed)
    records = _run(url, options, len(due_s), due_s)
    found = foresee(pace, limits, traffic, options.replicas)
    offered = Offered(
        rate,
        len(records),
        found.ttft_p95_s,
        float(np.percentile([record.ttft_s for record in records], 95)),
        found.tpot_s,
        statistics.median(record.tpot_s or 0.0 for record in records),
    )
    print(
        f"{rate:7.2f} requests/s: TTFT p95 {offered.ttft_p95_s:6.3f} s (foreseen {found.ttft_p95_s:.3f}), "
        f"{1e3 * offered.tpot_s:.0f} ms a token (foreseen {1e3 * found.tpot_s:.0f})",
        flush=True,
    )
    return offered


def _run(
    url: SplitResult, options: argparse.Namespace, num_requests: int, due_s: list[float], concurrency: int = 64
) -> list[StreamRecord]:
    """Prompts are new in each run: nothing is cached."""
    draw = np.random.default_rng()
    payloads = [
        completion_request(
            url,
            {
                "model": MODEL,
                "prompt": draw.integers(_VOCABULARY.start, _VOCABULARY.stop, options.prompt_tokens).tolist(),
                "max_tokens": options.output_tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        for _ in range(num_requests)
    ]
    records = asyncio.run(run_load(url, Load(payloads, concurrency, due_s)))
    failed = next((record.error for record in records if record.error is not None), None)
    if failed is not None:
        raise RuntimeError(failed)
    return records


def _config(options: argparse.Namespace) -> dict[str, Any]:
    engine = {
        "max_num_seqs": options.max_num_seqs,
        "num_blocks": _NUM_BLOCKS,
        "block_size": _BLOCK_SIZE,
        "max_num_batched_tokens": _STEP_TOKENS,
    }
    # As most are deployed: what finds no seat waits in the ingress, for a minute at most.
    return one_model_config(options.device, engine, options.replicas)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The capacity formula against a real server")
    parser.add_argument("--device", default="cpu", help="cpu, or simulated:prefill=TOKENS_PER_S,step_ms=MS")
    parser.add_argument("--replicas", type=positive, default=1)
    parser.add_argument("--max-num-seqs", type=positive, default=16)
    parser.add_argument("--prompt-tokens", type=positive, default=64)
    parser.add_argument("--output-tokens", type=positive, default=32)
    parser.add_argument("--ttft-target", type=float, default=1.0, help="seconds, of 95 in 100 requests")
    parser.add_argument("--multiples", type=float, nargs="+", default=[0.7, 0.9, 1.1, 1.3], help="of the foreseen rate")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each rate")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals")
    return parser.parse_args()


if __name__ == "__main__":
    main()
