"""Fig. 18: what paging costs the attention kernel, and latency by block size (§7.1, §7.2). Nothing is simulated."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure as Drawing

from benchmarks.paper.figure import Context, Figure, Outcome, Row
from benchmarks.paper.real import MODEL, SmallPool, make_real_engine, num_threads, replay_real
from benchmarks.paper.real_kernels import AttentionShape, attention_seconds
from benchmarks.paper.replay import Replay
from benchmarks.paper.traces import DrawnLengths, LogNormal, poisson_trace
from engine.kernels.cpu import CpuBackend

_OPT_13B_HEADS, _OPT_13B_HEAD_DIM = 40, 128
_BATCHES, _CONTEXTS = (8, 32), (64, 128, 256)
_PAPER_OVERHEAD = (1.20, 1.26)  # §7.1: 20-26 % more than FasterTransformer's kernel

_NUM_SLOTS = 1024
_BLOCK_SIZES, _QUICK_BLOCK_SIZES = (4, 8, 16, 32, 64, 128, 256), (16, 128)
# A CPU generates some hundred tokens a second: the paper's lengths, ShareGPT's divided by 4.
_TRACES = (
    DrawnLengths("ShareGPT / 4", LogNormal(40.3, 1.0, 240), LogNormal(84.5, 0.8, 240)),
    DrawnLengths("Alpaca", LogNormal(19.31, 0.5, 240), LogNormal(58.45, 0.8, 240)),
)
_RATE = 2.0


class _Kernel(NamedTuple):
    num_seqs: int
    context: int
    paged_s: float
    contiguous_s: float

    @property
    def overhead(self) -> float:
        return self.paged_s / self.contiguous_s


class _EndToEnd(NamedTuple):
    trace: str
    block_size: int
    replay: Replay


def run(context: Context) -> Outcome:
    torch.set_num_threads(num_threads())
    kernels = CpuBackend(num_threads())
    measured = [
        _measure_kernel(kernels, num_seqs, length, context.scale.real_s)
        for num_seqs in _BATCHES
        for length in _CONTEXTS
    ]
    runs = _measure_end_to_end(quick=context.scale.quick)
    rows = [
        Row(
            f"attention, batch {item.num_seqs}, context {item.context}: blocks of 16 over contiguous",
            "x",
            item.overhead,
            _PAPER_OVERHEAD,
            f"{item.paged_s * 1e6:.0f} us",
        )
        for item in measured
    ]
    rows += [
        Row(
            f"{item.trace}, block size {item.block_size}: normalized latency over that at 16",
            "x",
            item.replay.mean_normalized_latency / _at_16(runs, item.trace),
            note=f"{item.replay.mean_normalized_latency:.3f} s/token, {item.replay.num_preemptions} preemptions",
        )
        for item in runs
    ]
    notes = [
        f"Kernels: paged attention for the CPU ({kernels.isa}, {num_threads()} threads), OPT-13B's heads, float32.",
        "Each is compared with the same kernel over contiguous sequences; the paper compares with FasterTransformer's.",
        f"End to end: {MODEL} on this CPU with a pool of {_NUM_SLOTS} slots, {_RATE:g} requests/s.",
        *(trace.description for trace in _TRACES),
        "The paper finds 16 to 128 best for ShareGPT, 16 and 32 for Alpaca.",
    ]
    data: dict[str, Any] = {
        "kernels": [item._asdict() for item in measured],
        "end_to_end": [
            {
                "trace": item.trace,
                "block_size": item.block_size,
                "normalized_latency": item.replay.mean_normalized_latency,
                "num_preemptions": item.replay.num_preemptions,
            }
            for item in runs
        ],
    }
    return Outcome(rows, data, notes, lambda drawing: _draw(drawing, measured, runs))


def _measure_kernel(kernels: CpuBackend, num_seqs: int, context: int, seconds: float) -> _Kernel:
    shape = AttentionShape(_OPT_13B_HEADS, _OPT_13B_HEAD_DIM, num_seqs, context)
    paged, contiguous = (attention_seconds(kernels, shape, size, seconds) for size in (16, context))
    return _Kernel(num_seqs, context, paged, contiguous)


def _measure_end_to_end(*, quick: bool) -> list[_EndToEnd]:
    runs = []
    for block_size in _QUICK_BLOCK_SIZES if quick else _BLOCK_SIZES:
        engine = make_real_engine(SmallPool(_NUM_SLOTS, block_size), preemption="recompute")
        for lengths in _TRACES[1:] if quick else _TRACES:
            trace = poisson_trace(lengths, _RATE, 3.0 if quick else 20.0, seed=0)
            runs.append(_EndToEnd(lengths.name, block_size, replay_real(engine, trace)))
    return runs


def _at_16(runs: list[_EndToEnd], trace: str) -> float:
    return next(item.replay.mean_normalized_latency for item in runs if (item.trace, item.block_size) == (trace, 16))


def _draw(drawing: Drawing, measured: list[_Kernel], runs: list[_EndToEnd]) -> None:
    drawing.set_size_inches(10, 4)
    axes = drawing.add_subplot(1, 2, 1)
    for num_seqs in _BATCHES:
        shown = [item for item in measured if item.num_seqs == num_seqs]
        contexts = [item.context for item in shown]
        axes.plot(contexts, [item.paged_s * 1e6 for item in shown], "o-", label=f"blocks of 16, batch {num_seqs}")
        axes.plot(contexts, [item.contiguous_s * 1e6 for item in shown], "s--", label=f"contiguous, batch {num_seqs}")
    axes.set(title="attention kernel", xlabel="context", ylabel="us", yscale="log")
    axes.legend(fontsize="small")
    axes = drawing.add_subplot(1, 2, 2)
    for trace in dict.fromkeys(item.trace for item in runs):
        shown_runs = [item for item in runs if item.trace == trace]
        latencies = [item.replay.mean_normalized_latency for item in shown_runs]
        axes.plot([item.block_size for item in shown_runs], latencies, "o-", label=trace)
    axes.set(
        title="end to end", xlabel="block size", ylabel="normalized latency (s/token)", xscale="log", ylim=(0, None)
    )
    axes.legend(fontsize="small")


FIGURE = Figure("fig18", "Attention kernel and block size", run)
