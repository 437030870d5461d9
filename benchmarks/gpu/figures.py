"""What a visit must show: each figure that has a target, printed beside it as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.gpu.results import Missing, Rates, Timing

DECODE = "decode llama-8b 64 x 4096"
PREFILL = "prefill llama-8b 2048 of 8192"
ONE_LAYER = " in a pool of one layer"
FIXED_SPLIT = " with fixed splits"
SWAPS = tuple(f"swap {way} 256 blocks of 16, batched copy" for way in ("out", "in"))


class Figure(NamedTuple):
    """A measured value.

    Attributes:
        least, most: what it has to reach, or to keep below; both None where it is only told.
    """

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """None without a target. What is not a number meets none."""
        if self.least is not None:
            return self.value >= self.least
        return None if self.most is None else self.value <= self.most

    def line(self) -> str:
        if self.least is None and self.most is None:
            return f"= {self.name}: {self.value:.4g}"
        target = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return f"= {self.name}: {self.value:.4g} (target {target}: {'met' if self.met else 'MISSED'})"

    def json(self) -> dict[str, object]:
        return self._asdict() | {"met": self.met}


def attention_figures(timings: Sequence[Timing], missing: Sequence[Missing], rates: Rates) -> Iterator[Figure]:
    """Decodes against copies and peers, chunks of prompts against matrix products, and what pool and splits cost."""
    for name, what, least in (
        (DECODE, "decode attention, share of copy bandwidth", 0.85),
        (PREFILL, "prefill attention, share of the matrix rate", 0.6),
    ):
        ours = _ours(timings, name)
        if ours is None:
            continue
        yield Figure(f"{what} ({name})", ours.share(rates), least=least)
        peers = [item for item in timings if item.name == name and item.by != "quire"]
        # Peers without paging are bounds rather than peers.
        paged = [item for item in peers if "dense" not in item.by]
        if paged:
            best = min(paged, key=lambda item: item.seconds)
            target = 1.0 if name == DECODE else None
            yield Figure(f"{best.by}'s time over ours ({name})", best.seconds / ours.seconds, least=target)
        elif peers or missing:
            yield Figure(f"paged peers that could be imported ({name})", 0.0)
    for suffix, what in ((ONE_LAYER, "time in a pool of one layer over all"), (FIXED_SPLIT, "time with fixed splits")):
        for name in (DECODE, PREFILL):
            ours, other = _ours(timings, name), _ours(timings, name + suffix)
            if ours is not None and other is not None:
                yield Figure(f"{what}: ratio ({name})", other.seconds / ours.seconds)


def block_figures(timings: Sequence[Timing], rates: Rates) -> Iterator[Figure]:
    """Swaps against copies of pinned memory."""
    for name in SWAPS:
        ours = _ours(timings, name)
        if ours is not None:
            yield Figure(f"share of pinned copies' bandwidth ({name})", ours.share(rates), least=0.8)


def _ours(timings: Sequence[Timing], name: str) -> Timing | None:
    return next((item for item in timings if item.name == name and item.by == "quire"), None)
