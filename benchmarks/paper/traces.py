"""Requests and when they arrive: lengths drawn from log-normals or read from a real trace, Poisson arrivals."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from engine.errors import ConfigError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class TraceRequest(NamedTuple):
    """One request of a trace. Lengths in tokens; `num_shared` leading prompt tokens are the same in all requests."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_shared: int = 0


class Lengths(Protocol):
    """Where prompt and output lengths come from."""

    @property
    def description(self) -> str:
        """One line for a figure's caption."""
        ...

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        """Prompt and output lengths, `[count]` each, all at least 1."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose mean is `mean` after cutting to `most`; `sigma` is the standard deviation of their logarithm."""

    mean: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not 1.0 < self.mean < self.most:
            raise ConfigError(f"length distribution: mean={self.mean!r} must be above 1 and below most={self.most!r}")

    def lengths(self, normals: FloatArray) -> IntArray:
        return self._cut(self._mu(), normals)

    def _cut(self, mu: float, normals: FloatArray) -> IntArray:
        return np.clip(np.ceil(np.exp(mu + self.sigma * normals)), 1, self.most).astype(np.int64)

    def _mu(self) -> float:
        """Cutting lowers the mean, so mu is searched for rather than computed: on 10,000 quantiles of the normal."""
        probe = np.sort(np.random.default_rng(0).standard_normal(200_000))[10::20]
        low, high = np.log(self.mean) - 5.0, np.log(self.mean) + 5.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cut(middle, probe).mean() < self.mean else (low, middle)
        return float(low)


@dataclass(frozen=True)
class DrawnLengths:
    """Prompt and output lengths drawn independently; `num_shared` tokens of each prompt come on top."""

    name: str
    prompt: LogNormal
    output: LogNormal

    @property
    def description(self) -> str:
        return (
            f"{self.name}-shaped: log-normal lengths with means {self.prompt.mean:g} in (sigma {self.prompt.sigma:g}) "
            f"and {self.output.mean:g} out (sigma {self.output.sigma:g}), fixed seed"
        )

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        return self.prompt.lengths(rng.standard_normal(count)), self.output.lengths(rng.standard_normal(count))


@dataclass(frozen=True)
class RecordedLengths:
    """Pairs of lengths from a real trace, drawn with replacement."""

    source: str
    prompts: IntArray
    outputs: IntArray

    @property
    def description(self) -> str:
        return (
            f"lengths of {len(self.prompts)} requests from {self.source}: "
            f"means {self.prompts.mean():.1f} in and {self.outputs.mean():.1f} out"
        )

    def draw(self, count: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        rows = rng.integers(0, len(self.prompts), count)
        return self.prompts[rows], self.outputs[rows]


# The paper gives the means (§6.1). The spreads are this project's, and its figures cannot all be had with log-normals.
# ShareGPT: outputs by 1.0, as in public ShareGPT traces (1.08 in etalon's, whose prompts have 1.48); prompts by 1.3, so
# that the overloaded Orca policies, whose batches depend on lengths and memory alone, batch as many requests as in
# Fig. 13. Parallel sampling then saves more than in Fig. 15: prompts this long for their outputs' lives.
# Alpaca: prompts by 0.5. Outputs were tried at 0.6, 0.8 and 1.0. Fig. 13's 43.2 and 72.8 requests of Orca (Pow2) and
# (Oracle) came out at 60 and 96, 42 and 72, 28 and 60; Fig. 15's 6.1 and 9.8 % of 2 and 6 samples at 8.2 and 13.5, 7.1
# and 11.9, 6.1 and 10.2 (counted between steps). Fig. 13 wants 0.8, Fig. 15's samples want 1.0, its beams 0.6 or less.
SHAREGPT = DrawnLengths("ShareGPT", LogNormal(161.31, 1.3, 1024), LogNormal(337.99, 1.0, 1024))
ALPACA = DrawnLengths("Alpaca", LogNormal(19.31, 0.5, 1024), LogNormal(58.45, 0.8, 1024))


def poisson_trace(
    lengths: Lengths, rate: float, duration_s: float, seed: int, num_shared: int = 0
) -> list[TraceRequest]:
    """Requests that arrive within `duration_s` at `rate` a second on average; at least one.

    The same seed gives the same lengths at every rate, and arrival times that differ by a factor only.
    """
    count = max(1, round(rate * duration_s))
    prompts, outputs = lengths.draw(count, np.random.default_rng((seed, 1)))
    arrivals = np.cumsum(np.random.default_rng((seed, 2)).exponential(1.0 / rate, count))
    rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [TraceRequest(arrival, prompt + num_shared, output, num_shared) for arrival, prompt, output in rows]


def load_lengths(path: Path, max_tokens: int = 2048) -> RecordedLengths:
    """Lengths from a trace in its publishers' format, told apart by its first line.

    Known: etalon's processed CSV (`num_prefill_tokens,num_decode_tokens`), Azure's (`ContextTokens,GeneratedTokens`),
    the VTC artifact's (`prompt_len,output_len`) and Mooncake's JSON lines (`input_length`, `output_length`). Requests
    that exceed `max_tokens` in total, or have no prompt or output, are left out, as the paper does.

    Raises:
        ConfigError: the file is missing, of another format, malformed, or has no request of that size.
    """
    try:
        pairs = [pair for pair in _read_pairs(path) if min(pair) >= 1 and sum(pair) <= max_tokens]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path}: cannot be read: {error}") from error
    if not pairs:
        raise ConfigError(f"trace {path}: no request of 1 to {max_tokens} tokens")
    prompts, outputs = np.array(pairs, dtype=np.int64).T
    return RecordedLengths(path.name, prompts, outputs)


_COLUMNS = (
    ("num_prefill_tokens", "num_decode_tokens"),
    ("ContextTokens", "GeneratedTokens"),
    ("prompt_len", "output_len"),
    ("input_length", "output_length"),
)


def _read_pairs(path: Path) -> Iterator[tuple[int, int]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = _json_rows(path, file) if path.suffix == ".jsonl" else csv.DictReader(file)
        columns: tuple[str, str] | None = None
        for number, row in enumerate(rows, start=1):
            if columns is None:
                columns = next((pair for pair in _COLUMNS if row.keys() >= set(pair)), None)
                if columns is None:
                    known = "; ".join(", ".join(pair) for pair in _COLUMNS)
                    raise ConfigError(f"trace {path}: has fields {', '.join(map(str, row))}; known pairs: {known}")
            try:
                yield int(row[columns[0]]), int(row[columns[1]])
            except (KeyError, TypeError, ValueError) as error:
                raise ConfigError(f"trace {path}: request {number}: {columns[0]} or {columns[1]}: {error}") from error


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"trace {path}: line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"trace {path}: line {number} is no JSON object")
        yield row
