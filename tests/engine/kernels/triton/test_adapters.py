"""The grouped kernels of adapters in Triton's interpreter: against plain torch, and bitwise the same for a row in any
batch."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.adapter_products import AdapterRun, Factors, PlainAdapterProducts, cut_tiles
from engine.kernels.library import KernelError
from engine.kernels.reference import ReferenceBackend
from tests.engine.kernels.triton.interpreter import ADAPTERS, Interpreter

Slots = dict[int, list[Factors | None]]
# As q, k and v of a grouped attention: projections of one input, of several widths.
PARTS = [slice(0, 100), slice(100, 130), slice(130, 160)]
WIDTHS = [part.stop - part.start for part in PARTS]


def make_slots(in_features: int, ranks: dict[int, tuple[int, ...]], dtype: torch.dtype) -> Slots:
    """Adapters of these ranks, a rank a projection; 0 adds nothing to it."""
    generator = torch.Generator().manual_seed(in_features)
    return {
        slot: [
            Factors(
                (torch.randn(rank, in_features, generator=generator) / in_features**0.5).to(dtype),
                (torch.randn(width, rank, generator=generator) / rank**0.5).to(dtype),
            )
            if rank
            else None
            for rank, width in zip(of_parts, WIDTHS, strict=True)
        ]
        for slot, of_parts in ranks.items()
    }


def plain(y: torch.Tensor, x: torch.Tensor, slots: Slots, runs: list[AdapterRun]) -> torch.Tensor:
    """In float64."""
    products = PlainAdapterProducts(PARTS, ReferenceBackend())
    for slot, factors in slots.items():
        products.load(slot, [item and Factors(item.a.double(), item.b.double()) for item in factors])
    out = y.double()
    products.add_to(out, x.double(), cut_tiles(runs, products.tile_rows, torch.device("cpu")))
    return out


RANKS: dict[int, tuple[int, ...]] = {3: (4, 4, 4), 0: (33, 0, 16), 5: (0, 0, 0), 1: (1, 2, 0)}
# Rows of no adapter before, between and after; a run of several tiles; and one that adds nothing.
RUNS = [AdapterRun(0, 2, 40), AdapterRun(1, 40, 41), AdapterRun(3, 43, 60), AdapterRun(5, 60, 62)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("in_features", [64, 700], ids=["one split", "two splits"])
def test_equal_to_plain_torch(interpreter: Interpreter, in_features: int, dtype: torch.dtype) -> None:
    slots = make_slots(in_features, RANKS, dtype)
    torch.manual_seed(1)
    x = torch.randn(64, in_features + 8).to(dtype)[:, :in_features]  # rows apart
    y = torch.randn(64, 168).to(dtype)[:, :160]
    expected = plain(y, x, slots, RUNS)
    before = y.clone()
    interpreter.call(ADAPTERS, "add", (y, x, PARTS, slots, RUNS))
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert (y[2:40] != before[2:40])[:, :100].any(dim=1).all()
    for rows in (slice(0, 2), slice(41, 43), slice(60, 64)):
        assert torch.equal(y[rows], before[rows]), "rows without an adapter, or with one that adds nothing"
    assert torch.equal(y[2:40, 100:130], before[2:40, 100:130]), "a projection that slot 0 leaves alone"


def test_a_row_is_bitwise_the_same_alone_and_beside_others(interpreter: Interpreter) -> None:
    slots = make_slots(700, RANKS, torch.float32)
    torch.manual_seed(2)
    x, y = torch.randn(64, 700), torch.randn(64, 160)
    whole = y.clone()
    interpreter.call(ADAPTERS, "add", (whole, x, PARTS, slots, RUNS))
    for slot, row in ((0, 2), (0, 39), (1, 40), (3, 50)):
        alone = y[row : row + 1].clone()
        interpreter.call(ADAPTERS, "add", (alone, x[row : row + 1], PARTS, slots, [AdapterRun(slot, 0, 1)]))
        assert torch.equal(alone[0], whole[row]), row


def test_what_does_not_fit_is_refused(interpreter: Interpreter) -> None:
    slots = make_slots(64, {0: RANKS[3]}, torch.float32)
    runs = [AdapterRun(0, 0, 2)]
    for x, y, message in (
        (torch.ones(2, 65), torch.ones(2, 160), r"x has shape \[2, 65\], expected \[2, 64\]"),
        (torch.ones(2, 64), torch.ones(2, 160).half(), r"y has .* torch.float16"),
        (torch.ones(64, 2).t(), torch.ones(2, 160), r"x has shape \[2, 64\], strides \[1, 2\]"),
    ):
        with pytest.raises(KernelError, match=message):
            interpreter.call(ADAPTERS, "add", (y, x, PARTS, slots, runs))
