"""What computing more tokens costs, learnt from the steps that an engine has taken."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Weight of what was known before a new step is taken in: old steps count for less, as load and batches change.
_DECAY = 0.96


class _SizeClass(NamedTuple):
    """Decayed sums over steps of about one size: their number, and of tokens, context and seconds."""

    weight: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    seconds: float = 0.0
    context_squared: float = 0.0
    context_seconds: float = 0.0


class ComputeCost:
    """What it costs to compute more tokens: how much longer larger steps take than usual ones.

    Steps are kept by size, in classes from one power of two to the next, and fade only as others of their class come: a
    group that is recomputed makes large steps, and what these cost must outlast any number of small ones in which
    sequences only grow. The price is read off the lower convex hull of the classes' means. One line through all would
    not do: a device that is bound by reading its weights computes the first hundred tokens more for nothing. And what
    lies above the hull was slow for another reason: no device computes a token more for less the more it computes.

    Large steps are older than small ones, and what both read of the cache differs. Within a class it differs too, which
    tells what reading costs, so that all classes can be compared as if they read what steps read now.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _SizeClass] = {}  # by the bits of a step's size
        self._log_usual_size = 0.0
        self._usual_context = 0.0

    def observe(self, num_tokens: int, num_context_tokens: int, seconds: float) -> None:
        """Take in a step that computed `num_tokens`, whose attention read so many, and that moved no blocks."""
        gain = (1.0 - _DECAY) if self._classes else 1.0
        # The mean of logarithms: a few large steps make no step in between usual.
        self._log_usual_size += gain * (math.log(num_tokens) - self._log_usual_size)
        self._usual_context += gain * (num_context_tokens - self._usual_context)
        context = float(num_context_tokens)
        step = (1.0, num_tokens, context, seconds, context * context, context * seconds)
        known = self._classes.get(num_tokens.bit_length(), _SizeClass())
        sums = [_DECAY * total + value for total, value in zip(known, step, strict=True)]
        self._classes[num_tokens.bit_length()] = _SizeClass(*sums)

    def seconds(self, num_tokens: float) -> float:
        """What so many more tokens add to usual steps, as many to each as large steps take; 0.0 before any was seen."""
        if not self._classes:
            return 0.0
        hull = _lower_convex_hull(self._mean_steps())
        sizes, durations = [size for size, _ in hull], [duration for _, duration in hull]
        usual = math.exp(self._log_usual_size)
        room = sizes[-1] - usual
        if room < usual:
            return num_tokens * durations[-1] / sizes[-1]  # no step was much larger: all that is known is the mean
        num_full, rest = divmod(num_tokens, room)
        base, full, last = np.interp([usual, sizes[-1], usual + rest], sizes, durations).tolist()
        added: float = num_full * max(0.0, full - base) + max(0.0, last - base)
        return added

    def _mean_steps(self) -> list[tuple[float, float]]:
        """Mean size and duration of each class, smallest first, as if all read what steps usually read now."""
        covariance = variance = total = 0.0
        for item in self._classes.values():
            covariance += item.context_seconds - item.context * item.seconds / item.weight
            variance += item.context_squared - item.context * item.context / item.weight
            total += item.context_squared
        read_s = max(0.0, covariance / variance) if variance > 1e-9 * total else 0.0
        return sorted(
            (
                item.tokens / item.weight,
                item.seconds / item.weight + read_s * (self._usual_context - item.context / item.weight),
            )
            for item in self._classes.values()
        )


def _lower_convex_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points, sorted by x, that no line between two others passes below (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (y - y0) > (x - x0) * (y1 - y0):
                break
            hull.pop()
        hull.append((x, y))
    return hull
