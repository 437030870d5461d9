"""What adapters add to a linear layer: `y[rows] += (x[rows] Aᵀ) Bᵀ`, for the rows of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.kernels.backend import KernelBackend


class AdapterRows:
    """Which rows of the step in hand have which adapter; shared by all layers.

    Attributes:
        runs: slot → rows; the base's are in none. Set by the runner before each step.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, slice]] = []


class Factors(NamedTuple):
    """a `[rank, in]`, b `[out, rank]` with the scale in it."""

    a: torch.Tensor
    b: torch.Tensor


class LinearAdapters:
    """The adapters of one linear layer, by slot.

    Args:
        parts: the layer's projections, as rows of its weight.
    """

    def __init__(self, parts: Sequence[slice], rows: AdapterRows, kernels: KernelBackend) -> None:
        self._parts = parts
        self._rows = rows
        self._kernels = kernels
        self._slots: dict[int, list[Factors | None]] = {}

    def load(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Fill a slot: what is added to each projection, None for nothing."""
        self._slots[slot] = list(factors)

    def drop(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add their part to the base's product `y` of `x`, `[num_tokens, out]` and `[num_tokens, in]`."""
        for slot, rows in self._rows.runs:
            for part, factors in zip(self._parts, self._slots[slot], strict=True):
                if factors is not None:
                    shrunk = self._kernels.linear(x[rows], factors.a, None)
                    y[rows, part].add_(self._kernels.linear(shrunk, factors.b, None))
