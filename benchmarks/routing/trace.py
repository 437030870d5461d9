"""Requests of a trace in Mooncake's format: when they come, how long they are, and which blocks their prompts share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

# Tokens of one of the trace's blocks. Each hash covers the prompt up to its block's end.
BLOCK_SIZE = 512


class TracedRequest(NamedTuple):
    """A line of the trace; `hash_ids` has the prompt's last, partly filled block too."""

    timestamp_ms: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


class Arrival(NamedTuple):
    """A request at its time; `hash_offset` sees to it that copies of the trace share no block."""

    time_s: float
    request: TracedRequest
    hash_offset: int

    @property
    def chain(self) -> list[int]:
        """The hashes of its prompt's blocks."""
        offset = self.hash_offset
        return [block + offset for block in self.request.hash_ids]


def read_trace(path: Path) -> list[TracedRequest]:
    """The trace's lines. Raises ValueError, which names the line that is not one."""
    requests = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                request = TracedRequest(
                    float(row["timestamp"]),
                    int(row["input_length"]),
                    int(row["output_length"]),
                    tuple(map(int, row["hash_ids"])),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no request of Mooncake's format ({error!r})") from None
            requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no requests")
    return requests


def arrivals(trace: list[TracedRequest], jitter_ms: float, seed: int, copies: int = 1) -> list[Arrival]:
    """The trace, `copies` times over at once, in order of arrival.

    Timestamps stand for the beginning of a bucket (3 s in Mooncake's): each is moved by up to `jitter_ms`, anew for
    each copy.
    """
    draw = random.Random(seed)
    stride = 1 + max(max(request.hash_ids, default=0) for request in trace)
    found = [
        Arrival((request.timestamp_ms + draw.uniform(0.0, jitter_ms)) / 1000.0, request, copy * stride)
        for copy in range(copies)
        for request in trace
    ]
    found.sort(key=lambda arrival: arrival.time_s)
    return found


def ideal_hit_rate(trace: list[TracedRequest]) -> float:
    """Share of all prompt tokens that one replica with an endless cache would find in it."""
    seen: set[int] = set()
    hits = 0
    for request in trace:
        cached = next((index for index, block in enumerate(request.hash_ids) if block not in seen), None)
        num_blocks = len(request.hash_ids) if cached is None else cached
        hits += min(num_blocks * BLOCK_SIZE, request.input_length - 1)
        seen.update(request.hash_ids)
    return hits / sum(request.input_length for request in trace)
