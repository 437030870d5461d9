"""What keeping usage and handing metrics to Ray's agent cost: microseconds a request, and milliseconds an export.

Usage: requests begin and end on an asyncio loop at a steady rate while the ledger's threads write; measured are the
calls on the loop, and the process' CPU time a request above that of the same loop without a ledger. Then closed
segments are added to a day's totals. Metrics: in a worker of a small Ray cluster, samples as an ingress and as an
engine replica have them, handed over again and again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from app.ingress.generation import Usage
from app.telemetry.ingress_metrics import IngressMetrics
from app.telemetry.model_samples import counter_samples
from app.telemetry.node_agent import NodeAgentExport
from app.transport.counter_messages import ReplicaCounters
from app.usage import UsageLedger, UsageSettings
from app.usage.roll_up import roll_up
from app.usage.writer import UsageStats

_TICK_S = 0.01


def measure_usage(rate: int, seconds: float) -> dict[str, float]:
    """Requests at `rate` a second, each begun and ended, with a ledger and without."""
    with tempfile.TemporaryDirectory() as folder:
        settings = UsageSettings(Path(folder))
        ledger = UsageLedger(settings, "benchmark")
        with_ledger, calls_us = asyncio.run(_requests(ledger, rate, seconds))
        assert ledger.flush(60.0)
        written = ledger.stats.written
        ledger.close()
        without, empty_us = asyncio.run(_requests(None, rate, seconds))
        stats = UsageStats()
        files = sorted((Path(folder) / "kept").iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in files:
            file.rename(Path(folder) / "segments" / file.name)
        for file in (Path(folder) / "days").iterdir():
            file.unlink()
        began = time.perf_counter()
        roll_up(settings, stats)
        rolled_s = time.perf_counter() - began
    num_requests = rate * seconds
    return {
        "loop_us_a_request": round(statistics.median(calls_us) - statistics.median(empty_us), 2),
        "loop_us_a_request_p99": round(statistics.quantiles(calls_us, n=100)[98], 2),
        "cpu_us_a_request": round((with_ledger - without) / num_requests * 1e6, 2),
        "records_a_request": round(written / num_requests, 3),
        "bytes_a_request": round(size / num_requests, 1),
        "roll_up_us_a_record": round(rolled_s / written * 1e6, 2),
    }


async def _requests(ledger: UsageLedger | None, rate: int, seconds: float) -> tuple[float, list[float]]:
    """CPU seconds of the process, and the microseconds of each request's calls."""
    calls_us: list[float] = []
    clock = time.perf_counter
    cpu = time.process_time()
    due, began = 0, clock()
    while due < rate * seconds:
        await asyncio.sleep(_TICK_S)
        until = min(int((clock() - began) * rate), int(rate * seconds))
        for number in range(due, until):
            at = clock()
            if ledger is not None:
                request = ledger.begin(f"cmpl-{number:032x}", "key-0123456789ab", "model", "", Usage(500, 100, 20))
                ledger.end(request, 200, "stop")
            calls_us.append((clock() - at) * 1e6)
        due = max(due, until)
    return time.process_time() - cpu, calls_us


def measure_agent(num_exports: int, requests_between: int) -> dict[str, float]:
    """Exports of an ingress' and a replica's samples in a worker of Ray's."""
    import ray

    ray.init(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        found: dict[str, float] = ray.get(ray.remote(_exports).remote(num_exports, requests_between))
        return found
    finally:
        ray.shutdown()


def _exports(num_exports: int, requests_between: int) -> dict[str, float]:
    metrics = IngressMetrics()
    export = NodeAgentExport(list, 1.0)
    ingress_ms, replica_ms = [], []
    for number in range(num_exports):
        for _ in range(requests_between):
            record = metrics.arrived("chat")
            record.generates("model", "default", Usage(500, 100, 20), 1)
            record.first_tokens(0.01)
            record.last_tokens()
            record.code = 200
            record.end()
        counters = ReplicaCounters(num_steps=number + 1, num_output_tokens=number + 1, execute_s=float(number + 1))
        for samples, taken in (
            (metrics.samples, ingress_ms),
            (lambda told=counters: counter_samples("model", "replica", told), replica_ms),
        ):
            cpu = time.thread_time()
            export.export(samples())
            taken.append((time.thread_time() - cpu) * 1e3)
    return {
        "agent_ingress_ms_an_export": round(statistics.median(ingress_ms), 3),
        "agent_replica_ms_an_export": round(statistics.median(replica_ms), 3),
    }


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=1000, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--exports", type=int, default=100)
    parser.add_argument("--requests-between", type=int, default=100, help="requests between two exports")
    options = parser.parse_args()
    result: dict[str, Any] = {"rate": options.rate, "seconds": options.seconds}
    result |= measure_usage(options.rate, options.seconds)
    result |= measure_agent(options.exports, options.requests_between)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
