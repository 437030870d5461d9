"""What LoRA adapters cost a layer of Llama-8B: the base's product alone, with grouped kernels, and run by run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.results import Missing, Timing
from benchmarks.gpu.timer import event_seconds
from engine.kernels.adapter_products import AdapterProducts, AdapterRun, Factors, PlainAdapterProducts, cut_tiles
from engine.kernels.reference import ReferenceBackend

# q, k and v as one product.
IN_FEATURES, WIDTHS = 4096, (4096, 1024, 1024)
RANK = 16
# Rows of a batch, and how many adapters share them out evenly.
CASES = ((16, 4), (64, 8), (256, 32), (2048, 4))
_REPEATS = 20


def time_adapters() -> Iterator[Timing | Missing]:
    """Each case three times; bytes are those of the base's weight, or of the adapters' A and B and what they change.

    Eagerly, as steps with adapters run: launches count.
    """
    ends = [sum(WIDTHS[: i + 1]) for i in range(len(WIDTHS))]
    parts = [slice(end - width, end) for end, width in zip(ends, WIDTHS, strict=True)]
    device = torch.device("cuda", torch.cuda.current_device())
    weight = torch.randn(ends[-1], IN_FEATURES, device=device, dtype=torch.bfloat16)
    for num_rows, num_adapters in CASES:
        name = f"adapters {num_rows} rows, {num_adapters} of rank {RANK}"
        x = torch.randn(num_rows, IN_FEATURES, device=device, dtype=torch.bfloat16)
        y = torch.zeros(num_rows, ends[-1], device=device, dtype=torch.bfloat16)
        base = partial(torch.mm, x, weight.t(), out=y)
        yield Timing(f"{name}: the base", "torch", event_seconds(base, _REPEATS), weight.nbytes)
        rows = num_rows // num_adapters
        runs = [AdapterRun(slot, slot * rows, (slot + 1) * rows) for slot in range(num_adapters)]
        num_bytes = num_adapters * 2 * RANK * (len(parts) * IN_FEATURES + ends[-1]) + x.nbytes + 2 * y.nbytes
        ways: dict[str, AdapterProducts] = {"run by run": PlainAdapterProducts(parts, ReferenceBackend())}
        try:
            from engine.kernels.triton.adapters import TritonAdapterProducts

            ways["grouped"] = TritonAdapterProducts(parts, device)
        except ModuleNotFoundError as error:
            yield Missing(name, "grouped", str(error))
        for by, products in ways.items():
            for slot in range(num_adapters):
                products.load(slot, [_random_factors(width, device) for width in WIDTHS])
            add = partial(products.add_to, y, x, cut_tiles(runs, products.tile_rows, device))
            yield Timing(name, by, event_seconds(add, _REPEATS), num_bytes)


def _random_factors(width: int, device: torch.device) -> Factors:
    a = torch.randn(RANK, IN_FEATURES, device=device, dtype=torch.bfloat16) / IN_FEATURES**0.5
    return Factors(a, torch.randn(width, RANK, device=device, dtype=torch.bfloat16) / RANK**0.5)
