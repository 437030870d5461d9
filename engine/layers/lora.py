"""The adapters of a linear layer in the step in hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.kernels.adapter_products import AdapterProducts, AdapterTiles, Factors


class AdapterRows:
    """Which rows of the step in hand have which adapter; shared by all layers.

    Attributes:
        tiles: set by the runner before each step; None if no row has one.
    """

    def __init__(self) -> None:
        self.tiles: AdapterTiles | None = None


class LinearAdapters:
    """The adapters of one linear layer, by slot."""

    def __init__(self, rows: AdapterRows, products: AdapterProducts) -> None:
        self._rows = rows
        self._products = products

    def load(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Fill a slot: what is added to each projection, None for nothing."""
        self._products.load(slot, factors)

    def drop(self, slot: int) -> None:
        self._products.drop(slot)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add their part to the base's product `y` of `x`, `[num_tokens, out]` and `[num_tokens, in]`."""
        if self._rows.tiles is not None:
            self._products.add_to(y, x, self._rows.tiles)
