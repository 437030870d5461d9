"""Other engines' runs on the same requests: one JSON line each, as the peers' scripts print it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import NamedTuple


class EngineRun(NamedTuple):
    """What an engine reached on a list of requests.

    Attributes:
        out_tok_s: output tokens a second, one a run; `single_tok_s` those of one stream.
        load_s: until it was ready; None where that was not measured.
    """

    name: str
    out_tok_s: list[float]
    single_tok_s: list[float]
    load_s: float | None

    @property
    def batch(self) -> float:
        return statistics.median(self.out_tok_s)

    @property
    def single(self) -> float:
        return statistics.median(self.single_tok_s)


def read_peer(path: Path) -> EngineRun:
    """From the file's last line that is a JSON object, as engines log to the same stream.

    Raises:
        ValueError: there is none, or it lacks a figure.
    """
    for line in reversed(path.read_text().splitlines()):
        if not line.startswith("{"):
            continue
        item = json.loads(line)
        missing = {"peer", "out_tok_s", "single_tok_s"} - set(item)
        if missing:
            raise ValueError(f"{path}: its last JSON object lacks {', '.join(sorted(missing))}")
        single = item["single_tok_s"]
        return EngineRun(
            item["peer"], item["out_tok_s"], single if isinstance(single, list) else [single], item.get("load_s")
        )
    raise ValueError(f"{path}: no line of it is a JSON object")


def ratios(ours: EngineRun, peers: list[EngineRun]) -> dict[str, dict[str, float]]:
    """Ours over each peer's, medians."""
    return {
        peer.name: {"batch": round(ours.batch / peer.batch, 3), "single": round(ours.single / peer.single, 3)}
        for peer in peers
    }
