"""Fig. 19: swapping against recomputation by block size (§7.3): real copies, real prefill, nothing simulated."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Context, Figure, Outcome, Row
from benchmarks.paper.real import MODEL, SmallPool, make_real_engine, num_threads, replay_real
from benchmarks.paper.real_kernels import swap_seconds
from benchmarks.paper.replay import Replay
from benchmarks.paper.traces import DrawnLengths, LogNormal, poisson_trace
from engine.engine import LLMEngine
from engine.kernels.cpu import CpuBackend
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

_BLOCK_SIZES, _QUICK_BLOCK_SIZES = (1, 4, 16, 64, 256), (16,)
_CONTEXT = 256  # tokens that are swapped or computed again
_NUM_SLOTS = 512
_LENGTHS = DrawnLengths("ShareGPT / 4", LogNormal(40.3, 1.0, 240), LogNormal(84.5, 0.8, 240))
_RATE = 4.0  # more than a CPU serves, so that the pool fills up and groups are preempted


class _Measured(NamedTuple):
    """Seconds for one context, and how a replay under each way of preempting went."""

    block_size: int
    swap_out_s: float
    swap_in_s: float
    recompute_s: float
    swapping: Replay
    recomputing: Replay

    @property
    def swap_s(self) -> float:
        return self.swap_out_s + self.swap_in_s


def run(context: Context) -> Outcome:
    quick = context.scale.quick
    sizes = _QUICK_BLOCK_SIZES if quick else _BLOCK_SIZES
    measured = [_measure(size, context.scale.real_s, 3.0 if quick else 12.0) for size in sizes]
    flat = max(item.recompute_s for item in measured) / min(item.recompute_s for item in measured)
    rows = [Row("recomputing: slowest block size over fastest", "x", flat, 1.0, "the paper: constant")]
    for item in measured:
        size = item.block_size
        latency = item.swapping.mean_normalized_latency / item.recomputing.mean_normalized_latency
        paper = 1.0 if 16 <= size <= 64 else None
        note = f"{item.swapping.num_preemptions} and {item.recomputing.num_preemptions} preemptions"
        rows += [
            Row(f"block size {size}: swapping {_CONTEXT} tokens out and in", "ms", 1e3 * item.swap_s),
            Row(f"block size {size}: recomputing {_CONTEXT} tokens", "ms", 1e3 * item.recompute_s),
            Row(f"block size {size}: normalized latency, swapping over recomputing", "x", latency, paper, note),
        ]
    notes = [
        f"{MODEL} in float32 on this CPU, {num_threads()} threads; the swap pool is ordinary memory, not behind PCIe.",
        "So copies are cheap and prefill is dear here: the reverse of the paper's A100 at small blocks.",
        f"Latencies: {_LENGTHS.description}; {_RATE:g} requests/s on a pool of {_NUM_SLOTS} slots.",
    ]
    data: dict[str, Any] = {
        str(item.block_size): {
            "swap_out_s": item.swap_out_s,
            "swap_in_s": item.swap_in_s,
            "recompute_s": item.recompute_s,
            "normalized_latency_swapping": item.swapping.mean_normalized_latency,
            "normalized_latency_recomputing": item.recomputing.mean_normalized_latency,
        }
        for item in measured
    }
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, measured))


def _measure(block_size: int, seconds: float, duration_s: float) -> _Measured:
    pool = SmallPool(_NUM_SLOTS, block_size)
    trace = poisson_trace(_LENGTHS, _RATE, duration_s, seed=0)
    engine = make_real_engine(pool, preemption="recompute")
    recompute_s = _prefill_seconds(engine)
    recomputing = replay_real(engine, trace)
    torch.set_num_threads(num_threads())
    out_s, in_s = swap_seconds(engine.model_config, CpuBackend(num_threads()), block_size, _CONTEXT, seconds)
    swapping = replay_real(make_real_engine(pool, preemption="swap", num_swap_blocks=pool.num_blocks), trace)
    return _Measured(block_size, out_s, in_s, recompute_s, swapping, recomputing)


def _prefill_seconds(engine: LLMEngine) -> float:
    """The fastest of three steps that compute the context anew."""
    best = float("inf")
    for index in range(3):
        engine.add_request(
            EngineRequest(f"prefill-{index}", list(range(100, 100 + _CONTEXT)), SamplingParams(max_tokens=1))
        )
        begin = time.perf_counter()
        engine.step()
        best = min(best, time.perf_counter() - begin)
    return best


def _draw(drawing: Drawing, measured: list[_Measured]) -> None:
    drawing.set_size_inches(10, 4)
    sizes = [item.block_size for item in measured]
    axes = drawing.add_subplot(1, 2, 1)
    for label, values in (
        ("recompute", [item.recompute_s for item in measured]),
        ("swap in", [item.swap_in_s for item in measured]),
        ("swap out", [item.swap_out_s for item in measured]),
        ("swap in and out", [item.swap_s for item in measured]),
    ):
        axes.plot(sizes, [1e3 * value for value in values], "o-", label=label)
    axes.set(title=f"{_CONTEXT} tokens", xlabel="block size", ylabel="ms", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    axes = drawing.add_subplot(1, 2, 2)
    axes.plot(sizes, [item.recomputing.mean_normalized_latency for item in measured], "o-", label="recompute")
    axes.plot(sizes, [item.swapping.mean_normalized_latency for item in measured], "o-", label="swap")
    axes.set(
        title="end to end", xlabel="block size", ylabel="normalized latency (s/token)", xscale="log", ylim=(0, None)
    )
    axes.legend(fontsize="small")


FIGURE = Figure("fig19", "Swapping against recomputation", run)
