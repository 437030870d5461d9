"""Adapters in the layers of a torch model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from engine.adapters import AdapterChanges, LoraAdapter
from engine.kernels.adapter_products import AdapterRun, Factors, adapter_products, cut_tiles
from engine.kernels.backend import KernelBackend
from engine.layers.lora import AdapterRows, LinearAdapters
from engine.models import CausalLM
from engine.scheduling import SchedulerOutput


class TorchAdapters:
    """The slots of a model's linear layers."""

    def __init__(self, model: CausalLM, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._rows = AdapterRows()
        self._linears: list[tuple[tuple[str, ...], LinearAdapters]] = []
        self._tile_rows = 1
        make_products = adapter_products(kernels, device)
        for keys, linear in model.adaptable_linears():
            products = make_products(linear.parts)
            self._tile_rows = products.tile_rows
            linear.adapters = LinearAdapters(self._rows, products)
            self._linears.append((keys, linear.adapters))

    def apply(self, changes: AdapterChanges) -> None:
        """Empty and fill slots, in the order of the current stream: a step that is still running keeps its own."""
        for keys, adapters in self._linears:
            for slot in changes.drops:
                adapters.drop(slot)
            for slot, adapter, prepared in changes.loads:
                assert prepared is None or isinstance(prepared, PreparedAdapter), "it was prepared by another worker"
                host = [prepared.factors[key] if prepared else host_factors(adapter, key, self._dtype) for key in keys]
                adapters.load(slot, [self._on_device(factors) for factors in host])

    def begin_step(self, output: SchedulerOutput) -> bool:
        """Note which rows have which adapter. `output` is ordered by adapters.

        Returns:
            Whether any row has one.
        """
        runs: list[AdapterRun] = []
        end = 0
        for item in output.scheduled:
            begin, end = end, end + len(item.token_ids)
            if item.adapter_slot < 0:
                continue
            if runs and runs[-1].slot == item.adapter_slot:
                begin = runs.pop().first_row
            runs.append(AdapterRun(item.adapter_slot, begin, end))
        self._rows.tiles = cut_tiles(runs, self._tile_rows, self._device) if runs else None
        return bool(runs)

    def _on_device(self, factors: Factors | None) -> Factors | None:
        return factors and Factors(*(values.to(self._device, non_blocking=True) for values in factors))


class PreparedAdapter(NamedTuple):
    """An adapter in the host's memory, by matrix, in the model's type; None where nothing is added."""

    factors: dict[str, Factors | None]


def prepare_adapter(
    adapter: LoraAdapter, keys: Iterable[str], dtype: torch.dtype, device: torch.device
) -> PreparedAdapter:
    """Read an adapter's file, so that the step which loads it has only to copy: from pinned memory to a GPU."""
    prepared: dict[str, Factors | None] = {}
    for key in keys:
        factors = host_factors(adapter, key, dtype)
        if factors is not None and device.type == "cuda":
            factors = Factors(*(values.pin_memory() for values in factors))
        prepared[key] = factors
    return PreparedAdapter(prepared)


def host_factors(adapter: LoraAdapter, key: str, dtype: torch.dtype) -> Factors | None:
    """A and B of one matrix as tensors of their own."""
    factors = adapter.factors(key)
    # A copy: what lies in the file's mapping is neither writable nor to be kept.
    return None if factors is None else Factors(*(torch.tensor(values, dtype=dtype) for values in factors))
