"""The engine alone, measured on a small model."""

from __future__ import annotations

from benchmarks.cpu.requests import Request
from benchmarks.serving.offline import measure
from engine import LLM

OPTIONS = {"num_blocks": 64, "num_threads": 1, "dtype": "float32"}
REQUESTS = [Request([1, 2, 3, number], 5) for number in range(4)]


def test_tokens_time_and_cpu_time_are_measured() -> None:
    run = measure(LLM("dummy:tiny", max_num_seqs=2, **OPTIONS), REQUESTS)
    assert run.num_output_tokens == 20
    assert run.seconds > 0
    assert run.cpu_s > 0
