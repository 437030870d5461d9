"""What is sent: a list of requests, or a trace's, and when each is due."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cpu.requests import Request

# Tokens that a Mooncake `hash_id` stands for.
_TRACE_BLOCK = 512
# Ids that any vocabulary has, past the control tokens at its beginning.
_FIRST_ID, _NUM_IDS = 1000, 30000


class TraceOptions(NamedTuple):
    """How a trace becomes load that a small machine can bear.

    Attributes:
        speed: how many times faster than recorded requests come.
        scale: lengths are multiplied by this; shared prefixes stay shared.
        limit: requests taken, from the trace's beginning.
        max_tokens: longest request, prompt and output; longer prompts are cut.
    """

    speed: float = 1.0
    scale: float = 1.0
    limit: int | None = None
    max_tokens: int = 2048


def poisson_due(count: int, rate: float, seed: int) -> list[float]:
    """Arrivals at `rate` a second on average, the first at once."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
    return [0.0, *np.cumsum(gaps)[: count - 1].tolist()]


def read_trace(path: Path, options: TraceOptions, seed: int) -> tuple[list[Request], list[float]]:
    """Requests and their due times from Mooncake's JSON lines.

    Arrivals are recorded in steps of 3 seconds; within a step they are spread evenly, in an order of the seed's.

    Raises:
        ValueError: a line is not of that format.
    """
    rows = [_row(path, number, line) for number, line in enumerate(path.read_text().splitlines(), start=1)]
    rows = rows[: options.limit]
    if not rows:
        raise ValueError(f"{path}: no requests")
    rng = np.random.default_rng(seed)
    steps = sorted({row["timestamp"] for row in rows})
    step_ms = min((later - earlier for earlier, later in itertools.pairwise(steps)), default=0.0)
    begin_ms = rows[0]["timestamp"]
    due = [float((row["timestamp"] - begin_ms + rng.uniform(0.0, step_ms)) / 1e3 / options.speed) for row in rows]
    order = np.argsort(due, kind="stable").tolist()
    return [_request(rows[index], options) for index in order], [due[index] for index in order]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {
            "timestamp": float(row["timestamp"]),
            "input_length": int(row["input_length"]),
            "output_length": int(row["output_length"]),
            "hash_ids": [int(block) for block in row["hash_ids"]],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line {number} is no request of a Mooncake trace: {error!r}") from None


def _request(row: dict[str, Any], options: TraceOptions) -> Request:
    num_output = max(1, min(round(row["output_length"] * options.scale), options.max_tokens // 2))
    num_prompt = max(1, min(round(row["input_length"] * options.scale), options.max_tokens - num_output))
    return Request(
        prompt_of_blocks(row["hash_ids"], num_prompt, max(1, round(_TRACE_BLOCK * options.scale))), num_output
    )


def prompt_of_blocks(blocks: Sequence[int], length: int, block_tokens: int) -> list[int]:
    """Tokens that are a function of the block ids, so that equal prefixes of the trace are equal here."""
    tokens: list[int] = []
    for block in blocks:
        if len(tokens) >= length:
            break
        ids = np.random.default_rng(block).integers(_FIRST_ID, _FIRST_ID + _NUM_IDS, block_tokens)
        tokens += ids.tolist()
    tokens += [_FIRST_ID] * (length - len(tokens))
    return tokens[:length]
