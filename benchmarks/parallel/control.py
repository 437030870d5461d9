"""What it costs to tell all ranks of a step, with a model that computes nothing."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.parallel.null_rank import MAX_STEPS, NullWorker
from engine.config import CacheConfig, EngineConfig
from engine.control import WorkerProcesses
from engine.control.step_codec import encode_step
from engine.execution.parallel_executor import ParallelExecutor
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

_MAX_LEN = 4096
_BLOCK_SIZE = 16
_WARM_UP = 20


class ControlCost(NamedTuple):
    """Microseconds from handing a step to the executor until every rank could compute.

    Attributes:
        encode_us: of which rank 0 spends this before it goes on, sending included.
        message_bytes: of one step.
    """

    ranks: int
    batch: int
    gap_ms: float
    median_us: float
    p99_us: float
    encode_us: float
    message_bytes: int


def decode_step(batch: int, context: int, number: int = 0) -> SchedulerOutput:
    """A step in which `batch` sequences of `context` tokens draw one token each."""
    num_blocks = -(-context // _BLOCK_SIZE)
    params = SamplingParams(temperature=0.8, max_tokens=512)
    history = np.zeros(context, dtype=np.int32)
    scheduled = []
    for seq in range(batch):
        request = SampleRequest(seq, f"ingress-0123456789abcdef/{seq}", params, seq, 0, context, 100, history, -1.5)
        tokens = np.array([number + seq], dtype=np.int32)
        table = np.arange(seq * num_blocks, (seq + 1) * num_blocks, dtype=np.int32)
        scheduled.append(ScheduledSequence(seq, context - 1, tokens, table, (request,)))
    return SchedulerOutput(tuple(scheduled))


def measure_control(
    ranks: int, batch: int, *, context: int = 1024, steps: int = 400, gap_ms: float = 0.0
) -> ControlCost:
    """Run steps one after the other, each begun `gap_ms` after the one before: with a gap, the other ranks sleep."""
    assert _WARM_UP + steps <= MAX_STEPS
    with tempfile.TemporaryDirectory(prefix="quire-control-") as folder:
        path = Path(folder) / "begun"
        path.write_bytes(bytes(8 * ranks * MAX_STEPS))
        config = EngineConfig(tensor_parallel_size=ranks, num_swap_blocks=0)
        executor = ParallelExecutor.start(
            str(path), config, _MAX_LEN, NullWorker, WorkerProcesses("benchmarks.parallel.null_rank")
        )
        try:
            executor.build_cache(CacheConfig.of(config, executor.choose_num_blocks(_MAX_LEN)), _MAX_LEN)
            started = []
            for number in range(_WARM_UP + steps):
                output = decode_step(batch, context, number)
                time.sleep(gap_ms / 1e3)
                started.append(time.perf_counter_ns())
                executor.execute(output)
        finally:
            executor.close()
        begun = np.fromfile(path, np.int64).reshape(ranks, MAX_STEPS)[:, _WARM_UP : _WARM_UP + steps]
    before = np.array(started[_WARM_UP:])
    costs = (begun.max(axis=0) - before) / 1e3
    own = (begun[0] - before) / 1e3
    return ControlCost(
        ranks,
        batch,
        gap_ms,
        statistics.median(costs.tolist()),
        float(np.quantile(costs, 0.99)),
        statistics.median(own.tolist()),
        len(encode_step(decode_step(batch, context))),
    )
