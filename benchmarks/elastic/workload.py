"""A load that changes: requests whose rate follows a line through given points, or those of a trace."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.serving.workload import TraceOptions, read_trace


class ElasticRequest(NamedTuple):
    """Due so many seconds after the start."""

    due_s: float
    num_prompt: int
    num_output: int


class Prices(NamedTuple):
    """What a replica of the simulated device can do.

    Attributes:
        prefill_tokens_per_s, step_s: as in `device: simulated:prefill=...,step_ms=...`.
        step_tokens: token budget of a step.
        max_num_seqs: sequences that decode at once.
    """

    prefill_tokens_per_s: float = 6000.0
    step_s: float = 0.02
    step_tokens: int = 512
    max_num_seqs: int = 64

    @property
    def device(self) -> str:
        """As an engine option."""
        return f"simulated:prefill={self.prefill_tokens_per_s:g},step_ms={self.step_s * 1e3:g}"


class Lengths(NamedTuple):
    """Log-normal lengths in tokens: means, and how far they spread (sigma of the logarithm)."""

    mean_prompt: float = 600.0
    mean_output: float = 16.0
    spread: float = 0.6
    max_prompt: int = 2000
    max_output: int = 128

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """A prompt's and an output's length."""
        prompt, output = (
            round(rng.lognormvariate(math.log(mean) - self.spread**2 / 2, self.spread))
            for mean in (self.mean_prompt, self.mean_output)
        )
        return min(max(prompt, 1), self.max_prompt), min(max(output, 1), self.max_output)


# (second, replicas' worth of prompts a second): a first request wakes the model, load rises to four times within 30 s,
# bursts, stays, falls, and nothing comes any more.
SHAPE: tuple[tuple[float, float], ...] = (
    (2.0, 0.1),
    (9.0, 0.1),
    (9.0, 0.75),
    (20.0, 0.75),
    (50.0, 3.0),
    (66.0, 3.0),
    (72.0, 0.5),
    (80.0, 0.5),
    (80.0, 0.0),
)


def shaped_load(
    shape: Sequence[tuple[float, float]], prices: Prices, lengths: Lengths, seed: int
) -> list[ElasticRequest]:
    """Poisson arrivals whose rate goes straight from point to point of `shape`.

    Raises:
        ValueError: the points are not in order, or ask for less than nothing.
    """
    if any(later[0] < earlier[0] for earlier, later in itertools.pairwise(shape)):
        raise ValueError("the points of a load must be in order of time")
    if not shape or min(replicas for _, replicas in shape) < 0:
        raise ValueError("a load has points, none of them below 0 replicas")
    rng = random.Random(seed)
    per_replica = prices.prefill_tokens_per_s / lengths.mean_prompt
    peak = max(replicas for _, replicas in shape) * per_replica
    requests, now_s = [], shape[0][0]
    if shape[0][1] > 0:
        # The model is asked for when the load begins, not some time after.
        requests.append(ElasticRequest(now_s, *lengths.draw(rng)))
    while peak > 0:
        # Thinning: candidates at the peak's rate, of which as many stay as the rate then is of it.
        now_s += rng.expovariate(peak)
        if now_s >= shape[-1][0]:
            break
        if rng.random() * peak < replicas_at(shape, now_s) * per_replica:
            requests.append(ElasticRequest(now_s, *lengths.draw(rng)))
    return requests


def traced_load(path: Path, limit: int, speed: float, scale: float, seed: int) -> list[ElasticRequest]:
    """The first requests of a trace in Mooncake's format, the clock `speed` times as fast, lengths times `scale`.

    Raises:
        ValueError: a line is not of that format.
    """
    requests, due_s = read_trace(path, TraceOptions(speed=speed, scale=scale, limit=limit), seed)
    return [
        ElasticRequest(due, len(request.prompt), request.num_output_tokens)
        for request, due in zip(requests, due_s, strict=True)
    ]


def replicas_at(shape: Sequence[tuple[float, float]], now_s: float) -> float:
    """The load at a time, in replicas."""
    for (begin_s, begin), (end_s, end) in itertools.pairwise(shape):
        if begin_s <= now_s < end_s:
            return begin + (end - begin) * (now_s - begin_s) / (end_s - begin_s)
    return 0.0
