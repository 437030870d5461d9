"""Times calls on the GPU by replaying them from a CUDA graph, and what the device reaches at most."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.results import Rates

Call = Callable[[], object]


def graph_seconds(calls: Sequence[Call], target_s: float = 0.2, num_samples: int = 5) -> float:
    """Seconds of one call: all of them captured into one graph, which is replayed; the median of several samples.

    Args:
        calls: the same operation on different data, together more than the caches hold.
        target_s: of one sample.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = event_seconds(graph.replay, 1)
    repeats = max(1, int(target_s / max(once, 1e-6)))
    samples = [event_seconds(graph.replay, repeats) / len(calls) for _ in range(num_samples)]
    return statistics.median(samples)


def event_seconds(call: Call, repeats: int) -> float:
    """Seconds of one call between two events on the current stream, the mean of `repeats`."""
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def measure_rates() -> Rates:
    """Copies within the device and to and from pinned memory, and a large bfloat16 product of random numbers."""
    gib = 1 << 30
    source, target = (torch.empty(4 * gib, dtype=torch.uint8, device="cuda") for _ in range(2))
    host = torch.empty(gib, dtype=torch.uint8, pin_memory=True)
    copy_s = event_seconds(lambda: target.copy_(source), 10)
    out_s = event_seconds(lambda: host.copy_(source[:gib], non_blocking=True), 5)
    in_s = event_seconds(lambda: target[:gib].copy_(host, non_blocking=True), 5)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product_s = event_seconds(lambda: a @ b, 10)
    return Rates(8 * gib / copy_s, 2 * size**3 / product_s, gib / out_s, gib / in_s)
