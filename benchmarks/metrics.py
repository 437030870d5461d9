"""What the metrics cost: CPU time of all that is counted for a request, each second for a replica, and at a scrape.

In one process, over the application's own code: nothing switches metrics off, so that there is no server without them
to compare with. A request is recorded as its ingress does it; a replica tells its counters once a second to each
ingress, which decodes them; a scrape gathers an ingress's samples and those of `--replicas` replicas, and writes them
in Prometheus' text. `--token-us` is what a token costs a server as a whole, by `python -m benchmarks.tracing` or
`benchmarks.serving`; with it the last line, one JSON object, has the metrics' share at the load that the options give.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

from app.replica.counters import replica_counters
from app.telemetry.application import ApplicationMetrics
from app.telemetry.ingress_metrics import IngressMetrics
from app.telemetry.model_samples import ModelTelemetry, RouteCounts
from app.transport.counter_messages import ReplicaCounters, decode_counters, encode_counters
from app.transport.frames import FrameDecoder
from benchmarks.cpu.options import positive
from engine.memory import MemoryUsage
from engine.outputs import EngineAccounts, EngineStats

_STATS = EngineStats(4096, 2048, 3, 30, 900, 9000, 0, 0, 7, 12_345, 678_910, 1234, 567_890, 3, 100, 0)
_MEMORY = MemoryUsage(65536, 30000, 2000, 0, 0, 33536, 0, 0)


@dataclasses.dataclass
class Usage:
    """Tokens of one request."""

    prompt_tokens: int = 64
    completion_tokens: int = 128
    cached_tokens: int = 16


class Model:
    """A served model as the metrics see it, with so many replicas."""

    def __init__(self, name: str, num_replicas: int) -> None:
        self.id = name
        counters = replica_counters(EngineAccounts(_STATS, _MEMORY))
        replicas = {f"replica-{number}": counters for number in range(num_replicas)}
        self._told = ModelTelemetry(RouteCounts(), 0, 0, num_replicas, replicas)

    def telemetry(self) -> ModelTelemetry:
        """What is known of it now."""
        return self._told


def main() -> None:
    options = _arguments()
    own, accounts = IngressMetrics(), EngineAccounts(_STATS, _MEMORY)
    frame = encode_counters(replica_counters(accounts))
    models = [Model(f"model-{number}", options.replicas) for number in range(options.models)]
    application = ApplicationMetrics("ingress", lambda: models)

    def scrape() -> None:
        asyncio.run(application.exposed())

    for _ in range(100):
        _record(application.own)
    request_us = _microseconds(lambda: _record(own), options.repeats)
    tell_us = _microseconds(lambda: encode_counters(replica_counters(accounts)), options.repeats)
    hear_us = _microseconds(lambda: _decode(frame), options.repeats)
    scrape_us = _microseconds(scrape, max(10, options.repeats // 100))
    num_replicas = options.replicas * options.models
    per_second_us = num_replicas * (tell_us + hear_us) + scrape_us / options.scrape_interval
    per_token_us = request_us / options.output_tokens + per_second_us / options.tokens_per_s
    result = {
        "benchmark": "metrics",
        "request_us": round(request_us, 2),
        "tell_counters_us": round(tell_us, 2),
        "hear_counters_us": round(hear_us, 2),
        "scrape_us": round(scrape_us, 1),
        **{name: getattr(options, name) for name in ("models", "replicas", "output_tokens", "tokens_per_s")},
        "per_token_us": round(per_token_us, 3),
        "share_percent": None if options.token_us is None else round(100 * per_token_us / options.token_us, 3),
    }
    print(json.dumps(result))


def _record(own: IngressMetrics) -> None:
    """All that is recorded of one streamed request that goes well."""
    record = own.arrived("completions")
    record.generates("model-0", "default", Usage(), 1)
    record.first_tokens(0.01)
    record.last_tokens()
    record.code = 200
    record.end()


def _decode(frame: bytes) -> ReplicaCounters:
    decoder = FrameDecoder()
    (parsed,) = decoder.feed(frame)
    return decode_counters(parsed)


def _microseconds(call: Callable[[], object], repeats: int) -> float:
    """CPU time of one call: the median of seven rounds."""
    rounds = []
    for _ in range(7):
        before = time.process_time_ns()
        for _ in range(repeats):
            call()
        rounds.append((time.process_time_ns() - before) / repeats / 1e3)
    return statistics.median(rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What the metrics cost")
    parser.add_argument("--models", type=positive, default=1)
    parser.add_argument("--replicas", type=positive, default=1, help="of each model")
    parser.add_argument("--output-tokens", type=positive, default=128, help="of a request")
    parser.add_argument("--tokens-per-s", type=float, default=1000.0, help="that the application puts out")
    parser.add_argument("--scrape-interval", type=float, default=15.0, help="seconds")
    parser.add_argument("--token-us", type=float, help="CPU time of a token, all of the server's processes")
    parser.add_argument("--repeats", type=positive, default=2000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
