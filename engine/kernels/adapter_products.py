"""What LoRA adapters add to a linear layer's product: `y[rows] += (x[rows] Aᵀ) Bᵀ`, for the rows of each adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from engine.kernels.backend import KernelBackend


class Factors(NamedTuple):
    """a `[rank, in]`, b `[out, rank]` with the scale in it."""

    a: torch.Tensor
    b: torch.Tensor


class AdapterRun(NamedTuple):
    """Rows of a step, one after the other, that have one adapter."""

    slot: int
    first_row: int
    end_row: int


class AdapterTiles(NamedTuple):
    """A step's runs.

    Attributes:
        runs: in the order of their rows; the base's rows are in none.
        table: int32 `[n, 3]` on the device: the runs cut into tiles of `tile_rows` rows at most; slot, first row, end.
    """

    runs: Sequence[AdapterRun]
    table: torch.Tensor

    @property
    def slots(self) -> set[int]:
        """The slots that the step uses."""
        return {run.slot for run in self.runs}


class AdapterProducts(Protocol):
    """The adapters of one linear layer, by slot, and their products.

    Attributes:
        tile_rows: rows of a tile of the table.
    """

    tile_rows: int

    def load(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """Fill a slot: what is added to each projection, None for nothing. In the order of the current stream."""
        ...

    def drop(self, slot: int) -> None:
        """Empty a slot; one that is empty is no error."""
        ...

    def add_to(self, y: torch.Tensor, x: torch.Tensor, tiles: AdapterTiles) -> None:
        """Add to the base's product `y [num_rows, out]` of `x [num_rows, in]`."""
        ...


class PlainAdapterProducts:
    """AdapterProducts by two products for each run and projection: everywhere, and the reference."""

    tile_rows = 1 << 30

    def __init__(self, parts: Sequence[slice], kernels: KernelBackend) -> None:
        self._parts = parts
        self._kernels = kernels
        self._slots: dict[int, list[Factors | None]] = {}

    def load(self, slot: int, factors: Sequence[Factors | None]) -> None:
        """See AdapterProducts."""
        self._slots[slot] = list(factors)

    def drop(self, slot: int) -> None:
        """See AdapterProducts."""
        self._slots.pop(slot, None)

    def add_to(self, y: torch.Tensor, x: torch.Tensor, tiles: AdapterTiles) -> None:
        """See AdapterProducts."""
        for slot, first, end in tiles.runs:
            for part, factors in zip(self._parts, self._slots[slot], strict=True):
                if factors is not None:
                    shrunk = self._kernels.linear(x[first:end], factors.a, None)
                    y[first:end, part].add_(self._kernels.linear(shrunk, factors.b, None))


MakeProducts = Callable[[Sequence[slice]], AdapterProducts]


def adapter_products(kernels: KernelBackend, device: torch.device) -> MakeProducts:
    """How layers on a device compute their adapters: by Triton's grouped kernels on a GPU that has Triton."""
    if device.type == "cuda":
        try:
            from engine.kernels.triton.adapters import TritonAdapterProducts
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
        else:
            return lambda parts: TritonAdapterProducts(parts, device)
    return lambda parts: PlainAdapterProducts(parts, kernels)


def cut_tiles(runs: Sequence[AdapterRun], tile_rows: int, device: torch.device) -> AdapterTiles:
    """A step's runs, and their tiles on the device."""
    import torch

    found = [
        (run.slot, first, min(first + tile_rows, run.end_row))
        for run in runs
        for first in range(run.first_row, run.end_row, tile_rows)
    ]
    table = torch.tensor(found, dtype=torch.int32).view(-1, 3)
    return AdapterTiles(runs, table.to(device, non_blocking=True))
