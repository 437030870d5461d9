"""Adapters in the layers of a torch model."""

from __future__ import annotations

import torch

from engine.adapters import AdapterChanges, LoraAdapter
from engine.kernels.backend import KernelBackend
from engine.layers.lora import AdapterRows, Factors, LinearAdapters
from engine.models import CausalLM
from engine.scheduling import SchedulerOutput


class TorchAdapters:
    """The slots of a model's linear layers."""

    def __init__(self, model: CausalLM, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._rows = AdapterRows()
        self._linears: list[tuple[tuple[str, ...], LinearAdapters]] = []
        for keys, linear in model.adaptable_linears():
            linear.adapters = LinearAdapters(linear.parts, self._rows, kernels)
            self._linears.append((keys, linear.adapters))

    def apply(self, changes: AdapterChanges) -> None:
        """Empty and fill slots, in the order of the current stream: a step that is still running keeps its own."""
        for keys, adapters in self._linears:
            for slot in changes.drops:
                adapters.drop(slot)
            for slot, adapter in changes.loads:
                adapters.load(slot, [self._factors(adapter, key) for key in keys])

    def begin_step(self, output: SchedulerOutput) -> bool:
        """Note which rows have which adapter. `output` is ordered by adapters.

        Returns:
            Whether any row has one.
        """
        runs: list[tuple[int, slice]] = []
        end = 0
        for item in output.scheduled:
            begin, end = end, end + len(item.token_ids)
            if item.adapter_slot < 0:
                continue
            if runs and runs[-1][0] == item.adapter_slot:
                begin = runs.pop()[1].start
            runs.append((item.adapter_slot, slice(begin, end)))
        self._rows.runs = runs
        return bool(runs)

    def _factors(self, adapter: LoraAdapter, key: str) -> Factors | None:
        factors = adapter.factors(key)
        if factors is None:
            return None
        # A copy: what lies in the file's mapping is neither writable nor to be kept.
        return Factors(*(torch.tensor(values, dtype=self._dtype, device=self._device) for values in factors))
