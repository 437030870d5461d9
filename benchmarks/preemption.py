"""Swap, recompute or auto: one workload under each way of preemption, over a grid of what decides between them.

    python -m benchmarks.preemption [--quick] [--real] [--device NAME] [--out FILE]

The grid is copy bandwidth × share of the context that a live group shares × context length. In each cell many requests
grow in a pool that holds a third of them, so that most are preempted. By default the device is simulated: named
hardware on a virtual clock, its copy bandwidth set to the cell's. `--real` runs a small model on this machine's CPU,
where copies between pool and swap pool are slowed on purpose to the cell's bandwidth; its three engines take steps in
turn, so that other work on the machine slows all ways alike. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args
from unittest import mock

import numpy as np

from engine.config import EngineConfig, Preemption
from engine.engine import LLMEngine
from engine.execution.executor import UniprocExecutor
from engine.execution.hardware import find_hardware
from engine.execution.simulated import VirtualClock, build_simulated_engine
from engine.loading import open_checkpoint
from engine.preemption import SwapCost
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.scheduling import SamplerOutput, SchedulerOutput

if TYPE_CHECKING:
    from engine.execution.worker import Worker

BLOCK_SIZE = 16
WAYS: tuple[Preemption, ...] = ("swap", "recompute", "auto")
assert set(WAYS) == set(get_args(Preemption))


class Cell(NamedTuple):
    """One workload on one device. `copy_gb_per_s` is each way, between the device's memory and the host's."""

    device: str
    copy_gb_per_s: float
    shared_share: float
    context: int


class Grid(NamedTuple):
    """The cells of one device: all combinations.

    Attributes:
        pool_tokens: the KV pool, about. What fits it at once depends on the context and on what is shared.
    """

    device: str
    model: str
    copy_gb_per_s: tuple[float, ...]
    shared_shares: tuple[float, ...]
    contexts: tuple[int, ...]
    pool_tokens: int

    @property
    def cells(self) -> Iterator[Cell]:
        for bandwidth in self.copy_gb_per_s:
            for share in self.shared_shares:
                for context in self.contexts:
                    yield Cell(self.device, bandwidth, share, context)


# Bandwidths on both sides of each model's own break-even, from a slow link to one of tomorrow. The A100's pool is the
# paper's for OPT-13B (Table 1); the H200's would hold thirty times as much, which would only take longer.
SIMULATED = (
    Grid("a100-40gb", "dummy:opt-13b", (3.2, 12.8, 51.2, 102.4), (0.0, 0.3, 0.6), (256, 1024), 15_700),
    Grid("h200", "dummy:llama-3-8b", (2.0, 8.0, 51.2, 102.4), (0.0, 0.3, 0.6), (512, 2048), 24_000),
)
QUICK = tuple(
    grid._replace(
        copy_gb_per_s=grid.copy_gb_per_s[::2], shared_shares=grid.shared_shares[::2], contexts=grid.contexts[:1]
    )
    for grid in SIMULATED
)
# A model of random weights, so small that a cell takes half a minute, yet not so small that what a step costs beside
# its tokens hides them. A token's keys and values are 16 KiB and its computation takes about half a millisecond.
REAL_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": 2048,
    "torch_dtype": "float32",
}
REAL = Grid("this CPU", "written by real_grid", (0.01, 0.05, 0.5, 5.0), (0.0, 0.5), (128, 256), 768)
REAL_QUICK = REAL._replace(copy_gb_per_s=REAL.copy_gb_per_s[::3], contexts=REAL.contexts[:1])


class Run(NamedTuple):
    """One way's run of one cell."""

    seconds: float
    num_preemptions: int
    num_swaps: int


class Workload:
    """Requests whose contexts all begin alike and end at most at `context` tokens, in a pool for a third of them.

    A quarter of what a request does not share is its prompt: all are admitted, and as they grow, most are preempted.
    The first request holds the shared prefix from the start: it is never preempted, and no other is longer.
    """

    def __init__(self, cell: Cell, vocab_size: int, pool_tokens: int) -> None:
        rng = np.random.default_rng(0)
        shared = round(cell.shared_share * cell.context / BLOCK_SIZE) * BLOCK_SIZE
        own = cell.context - shared
        num_resident = max(2, (pool_tokens - shared) // own)
        self.num_blocks = shared // BLOCK_SIZE + num_resident * -(-own // BLOCK_SIZE) + 1
        self.max_model_len = cell.context
        prefix = rng.integers(0, vocab_size, shared).tolist()
        num_prompt = max(1, own // 4)
        longest = own - num_prompt
        self._requests = [
            EngineRequest(
                f"{index}",
                prefix + rng.integers(0, vocab_size, num_prompt).tolist(),
                SamplingParams(
                    max_tokens=longest if index == 0 else int(longest * rng.uniform(0.4, 1.0)),
                    temperature=0.0,
                    ignore_eos=True,
                ),
            )
            for index in range(3 * num_resident)
        ]

    def options(self, way: Preemption) -> dict[str, Any]:
        """An engine's options. The swap pool holds all that can be preempted: no way falls back to another."""
        return {
            "block_size": BLOCK_SIZE,
            "num_blocks": self.num_blocks,
            "num_swap_blocks": 0 if way == "recompute" else 4 * self.num_blocks,
            "max_model_len": self.max_model_len,
            "max_num_seqs": len(self._requests),
            "preemption": way,
        }

    def begin(self, engine: LLMEngine) -> None:
        """Bring an engine to where timing starts."""
        first, *others = self._requests
        engine.add_request(first)
        while not engine.step():
            pass  # until its prompt is in the cache, for the others to share
        for request in others:
            engine.add_request(request)


def run_simulated(cell: Cell, grid: Grid) -> dict[str, Run]:
    """The cell under each way, in virtual seconds, and as "free" were preemption to take no time at all."""
    without_copies = cell._replace(copy_gb_per_s=math.inf)
    return {
        "swap": _run_simulated(cell, grid, "swap"),
        "auto": _run_simulated(cell, grid, "auto"),
        "recompute": _run_simulated(without_copies, grid, "recompute"),
        "free": _run_simulated(without_copies, grid, "swap"),
    }


@functools.cache  # what copies nothing is the same at every bandwidth
def _run_simulated(cell: Cell, grid: Grid, way: Preemption) -> Run:
    hardware = dataclasses.replace(find_hardware(cell.device), host_bandwidth=cell.copy_gb_per_s * 1e9)
    if math.isinf(cell.copy_gb_per_s):
        hardware = dataclasses.replace(hardware, block_copy_s=0.0)
    model = open_checkpoint(grid.model).model_config()
    workload = Workload(cell, model.vocab_size, grid.pool_tokens)
    clock = VirtualClock()
    engine, _ = build_simulated_engine(model, hardware, EngineConfig.from_dict(workload.options(way)), clock)
    workload.begin(engine)
    began = clock.now()
    while engine.has_unfinished_requests:
        engine.step()
    return _run_of(engine, clock.now() - began)


def _run_of(engine: LLMEngine, seconds: float) -> Run:
    stats = engine.stats()
    return Run(seconds, stats.num_preemptions, stats.num_swaps)


@contextlib.contextmanager
def real_grid(grid: Grid) -> Iterator[Grid]:
    """The grid with REAL_MODEL's configuration on disk, where `dummy:` finds it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(REAL_MODEL))
        yield grid._replace(model=f"dummy:{path}")


def run_real(cell: Cell, grid: Grid, rounds: int) -> dict[str, Run]:
    """The cell under each way, in the one of several rounds whose auto is the median against the better way."""
    timed = sorted((_run_round(cell, grid) for _ in range(rounds)), key=lambda runs: _auto_ratio(runs))
    return timed[len(timed) // 2]


def _run_round(cell: Cell, grid: Grid) -> dict[str, Run]:
    """All ways together, a step of one at a time: always of the one that has had the least time so far."""
    workload = Workload(cell, open_checkpoint(grid.model).model_config().vocab_size, grid.pool_tokens)
    engines = {way: build_slowed_engine(grid.model, workload.options(way), cell.copy_gb_per_s * 1e9) for way in WAYS}
    for engine in engines.values():
        workload.begin(engine)
    seconds: dict[str, float] = dict.fromkeys(engines, 0.0)
    while unfinished := [way for way, engine in engines.items() if engine.has_unfinished_requests]:
        way = min(unfinished, key=seconds.__getitem__)
        began = time.perf_counter()
        engines[way].step()
        seconds[way] += time.perf_counter() - began
    return {way: _run_of(engine, seconds[way]) for way, engine in engines.items()}


def _auto_ratio(runs: dict[str, Run]) -> float:
    return runs["auto"].seconds / min(runs["swap"].seconds, runs["recompute"].seconds)


class SlowedExecutor(UniprocExecutor):
    """The real executor behind a slow link: each block that is swapped waits as long as the link takes for its bytes.

    What swapping costs, the engine measured without the link; its time comes on top.
    """

    def __init__(self, bytes_per_s: float, worker: Worker) -> None:
        super().__init__(worker)
        self._bytes_per_s = bytes_per_s

    def execute(self, output: SchedulerOutput) -> SamplerOutput:
        num_moved = len(output.blocks_to_swap_out) + len(output.blocks_to_swap_in)
        if num_moved:
            cost = super().swap_cost()
            assert cost is not None
            time.sleep(num_moved * cost.block_bytes / self._bytes_per_s)
        return super().execute(output)

    def swap_cost(self) -> SwapCost | None:
        cost = super().swap_cost()
        if cost is None:
            return None
        rates = (1.0 / (1.0 / rate + 1.0 / self._bytes_per_s) for rate in (cost.out_bytes_per_s, cost.in_bytes_per_s))
        return SwapCost(cost.block_bytes, *rates)


def build_slowed_engine(model: str, options: dict[str, Any], bytes_per_s: float) -> LLMEngine:
    with mock.patch("engine.build.UniprocExecutor", functools.partial(SlowedExecutor, bytes_per_s)):
        return LLMEngine.from_options(model, EngineConfig.from_dict({"dtype": "float32", **options}))


def row_of(cell: Cell, runs: dict[str, Run]) -> dict[str, Any]:
    """`overhead_ratio`, where it is known: what preemption itself took under auto, over the same of the best way."""
    winner = min(("swap", "recompute"), key=lambda way: runs[way].seconds)
    loser = max(runs["swap"].seconds, runs["recompute"].seconds)
    best, auto = runs[winner].seconds, runs["auto"].seconds
    free = runs["free"].seconds if "free" in runs else math.nan
    return {
        **cell._asdict(),
        **{f"{way}_s": round(run.seconds, 4) for way, run in runs.items()},
        "num_preemptions": {way: runs[way].num_preemptions for way in WAYS},
        "auto_swaps": runs["auto"].num_swaps,
        "winner": winner,
        "loser_ratio": round(loser / best, 4),
        "auto_ratio": round(_auto_ratio(runs), 4),
        "overhead_ratio": round((auto - free) / (best - free), 3) if best > free else None,
    }


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per device: how far auto is behind at worst, how far a wrong choice would be, and how often each way wins."""
    result: dict[str, Any] = {}
    for device in dict.fromkeys(row["device"] for row in rows):
        mine = [row for row in rows if row["device"] == device]
        result[device] = {
            "num_cells": len(mine),
            "worst_auto_ratio": max(row["auto_ratio"] for row in mine),
            "worst_overhead_ratio": max(
                (row["overhead_ratio"] for row in mine if row["overhead_ratio"] is not None), default=None
            ),
            "mean_auto_ratio": round(statistics.mean(row["auto_ratio"] for row in mine), 4),
            "worst_loser_ratio": max(row["loser_ratio"] for row in mine),
            "swap_wins": round(sum(row["winner"] == "swap" for row in mine) / len(mine), 3),
            "recompute_wins": round(sum(row["winner"] == "recompute" for row in mine) / len(mine), 3),
        }
    return result


def table_of(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The rows in Markdown."""
    heads = "device, copy GB/s, shared, context, swap s, recompute s, auto s, swaps, winner, loser / best, auto / best"
    columns = [*heads.split(", "), "overhead"]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    yield from map(_table_row, rows)


def _table_row(row: dict[str, Any]) -> str:
    overhead = row["overhead_ratio"]
    return (
        f"| {row['device']} | {row['copy_gb_per_s']:g} | {row['shared_share']:.0%} | {row['context']} "
        f"| {row['swap_s']:.2f} | {row['recompute_s']:.2f} | {row['auto_s']:.2f} "
        f"| {row['auto_swaps']} of {row['num_preemptions']['auto']} | {row['winner']} "
        f"| {row['loser_ratio']:.3f} | {row['auto_ratio']:.3f} | {'' if overhead is None else f'{overhead:.2f}'} |"
    )


def run_grid(grid: Grid, run_cell: Callable[[Cell, Grid], dict[str, Run]]) -> Iterator[dict[str, Any]]:
    for cell in grid.cells:
        row = row_of(cell, run_cell(cell, grid))
        print(_table_row(row), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the grid")
    parser.add_argument("--real", action="store_true", help="this machine's CPU in place of simulated devices")
    parser.add_argument("--device", choices=[grid.device for grid in SIMULATED], help="only this simulated one")
    parser.add_argument("--rounds", type=int, default=5, help="with --real: rounds a cell, of which one is the median")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.real and arguments.device is not None:
        parser.error("--device names a simulated device; --real has none")
    if arguments.real:
        with real_grid(REAL_QUICK if arguments.quick else REAL) as grid:
            rows = list(run_grid(grid, functools.partial(run_real, rounds=arguments.rounds)))
    else:
        rows = []
        for grid in QUICK if arguments.quick else SIMULATED:
            if arguments.device in (None, grid.device):
                print(f"{grid.device} is simulated, running {grid.model}: {find_hardware(grid.device).source}")
                rows += run_grid(grid, run_simulated)
    summary = summary_of(rows)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(table_of(rows)) + "\n")
    for device, values in summary.items():
        print(f"{device}: {values}")
    print(json.dumps({"simulated": not arguments.real, "summary": summary, "cells": rows}))


if __name__ == "__main__":
    main()
