"""What a replay watches: how many sequences run together, and what the KV memory holds.

Means over the time in which requests arrive, less its first fifth, in which the engine fills, and without the time
after it, in which it empties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.paper.traces import TraceRequest
from engine.engine import LLMEngine
from engine.execution.simulated import SimulatedExecutor

# The kinds of the paper's Fig. 2, which shows what allocators round up to among "external fragmentation & others".
KINDS = ("token states", "reserved", "internal fragmentation", "external fragmentation & others")
# Counting the pool's content takes as long as a step; its mean needs no more than every so many steps.
_SAMPLE_EVERY = 16


class Window(NamedTuple):
    """The part of a replay that is measured, in seconds since it began."""

    start_s: float
    end_s: float

    @classmethod
    def of(cls, trace: Sequence[TraceRequest]) -> Window:
        last = trace[-1].arrival_s
        return cls(0.2 * last, last)

    def overlap(self, begin: float, end: float) -> float:
        """Seconds of a step that lie within."""
        return max(0.0, min(end, self.end_s) - max(begin, self.start_s))


class BatchMeter:
    """The mean number of sequences a step schedules, weighted by how long the step lasts."""

    def __init__(self, executor: SimulatedExecutor, window: Window) -> None:
        self._executor = executor
        self._window = window
        self._seq_seconds = self._seconds = 0.0

    def __call__(self, begin: float, end: float) -> None:
        seconds = self._window.overlap(begin, end)
        self._seq_seconds += self._executor.last_work.num_seqs * seconds
        self._seconds += seconds

    @property
    def mean(self) -> float:
        return self._seq_seconds / self._seconds if self._seconds else 0.0


class MemoryMeter:
    """What the KV memory is held for, in token slots, and what sharing saves, in blocks.

    Sharing is counted while a step runs. Between two steps it looks like more: the beams that have just been forked
    still share the block that each of them gets a copy of before it writes.
    """

    def __init__(self, engine: LLMEngine, executor: SimulatedExecutor, window: Window) -> None:
        self._engine = engine
        self._executor = executor
        self._window = window
        self._num_steps = 0
        self._seconds = self._sampled_s = 0.0
        self._sums: dict[str, float] = {}

    def __call__(self, begin: float, end: float) -> None:
        seconds = self._window.overlap(begin, end)
        if not seconds:
            return
        self._num_steps += 1
        self._seconds += seconds
        if self._num_steps % _SAMPLE_EVERY:
            return
        for kind, slots in self._usage().items():
            self._sums[kind] = self._sums.get(kind, 0.0) + slots * self._seconds
        self._sampled_s += self._seconds
        self._seconds = 0.0

    def means(self) -> dict[str, float]:
        """Means by name; empty after fewer steps than one sample takes."""
        return {kind: total / self._sampled_s for kind, total in self._sums.items()} if self._sampled_s else {}

    def _usage(self) -> dict[str, float]:
        usage = self._engine.memory_usage()
        tables = self._executor.last_tables
        num_entries = sum(map(len, tables))
        return {
            "token states": usage.token_states,
            "reserved": usage.reserved,
            "internal fragmentation": usage.internal_fragmentation,
            "external fragmentation & others": usage.rounding + usage.external_fragmentation,
            "free": usage.free,
            "blocks without sharing": num_entries,
            "blocks saved": num_entries - len(np.unique(np.concatenate(tables))) if tables else 0,
        }
