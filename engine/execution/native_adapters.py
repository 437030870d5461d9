"""Adapters in the slots of a native decoder: packed as its weights are, side by side where they read one input."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.adapters import AdapterChanges, LoraAdapter, LoraFactors
from engine.execution.native_decoder import NativeDecoder
from engine.kernels.decoder_abi import AdapterGroup, AdapterLayer, Weight, WeightType
from engine.kernels.library import KernelLibrary
from engine.loading.pack_floats import pack_floats, packed_bytes
from engine.loading.packed_weights import PackedMatrix

# The matrices of a layer that read one input, by QuireAdapterLayer's names; the order is that of the C++ step.
_GROUPS = {
    "attention_in": ("query", "key", "value"),
    "attention_out": ("attention_out",),
    "mlp_in": ("gate", "up"),
    "down": ("down",),
}


def adapter_bytes(library: KernelLibrary, adapter: LoraAdapter, dtype: str) -> int:
    """What an adapter takes once packed in `dtype`, "float32" or "bfloat16"."""
    weight_type = _weight_type(dtype)
    total = 0
    for layer in {key.split(".")[1] for key in adapter.ranks}:
        for names in _GROUPS.values():
            keys = [key for key in (f"layers.{layer}.{name}" for name in names) if key in adapter.ranks]
            shapes = [(adapter.shape(key)[0], adapter.ranks[key]) for key in keys]
            if keys:
                shapes.append((sum(adapter.ranks[key] for key in keys), adapter.shape(keys[0])[1]))
            total += sum(packed_bytes(library, weight_type, n, k) for n, k in shapes)
    return total


class PackedAdapter(NamedTuple):
    """An adapter as a decoder takes it: `layers` point into `kept`."""

    layers: ctypes.Array[AdapterLayer]
    kept: list[PackedMatrix]


def pack_adapter(library: KernelLibrary, adapter: LoraAdapter, num_layers: int, dtype: str) -> PackedAdapter:
    """Read and pack an adapter in `dtype`, "float32" or "bfloat16", on the calling thread alone."""
    kept: list[PackedMatrix] = []
    layers = (AdapterLayer * num_layers)()
    for i, layer in enumerate(layers):
        for group in _groups(adapter, i):
            setattr(layer, group.name, _pack(library, group, _weight_type(dtype), kept))
    return PackedAdapter(layers, kept)


class NativeAdapters:
    """The slots. `dtype` is the type that adapters are packed in."""

    def __init__(self, library: KernelLibrary, decoder: NativeDecoder, num_layers: int, dtype: str) -> None:
        self._library = library
        self._decoder = decoder
        self._num_layers = num_layers
        self._dtype = dtype
        self._kept: dict[int, list[PackedMatrix]] = {}  # what C++ holds pointers to, by slot

    def apply(self, changes: AdapterChanges) -> None:
        """Empty and fill slots. Between two steps."""
        for slot in changes.drops:
            if slot in self._kept:
                self._decoder.set_adapter(slot, None)
                del self._kept[slot]
        for slot, adapter, packed in changes.loads:
            if packed is None:
                packed = pack_adapter(self._library, adapter, self._num_layers, self._dtype)
            assert isinstance(packed, PackedAdapter), "it was prepared by another worker"
            self._decoder.set_adapter(slot, packed.layers)
            self._kept[slot] = packed.kept


def _pack(library: KernelLibrary, group: _Group, weight_type: WeightType, kept: list[PackedMatrix]) -> AdapterGroup:
    def pack(values: np.ndarray) -> Weight:
        matrix = pack_floats(library, values, weight_type)
        kept.append(matrix)
        return Weight(matrix.data.ctypes.data, None, matrix.type.value, matrix.n, matrix.k)

    described = AdapterGroup()
    present = [factors for factors in group.factors if factors is not None]
    if present:
        described.a = pack(np.concatenate([factors.a for factors in present]))
    for i, factors in enumerate(group.factors):
        if factors is not None:
            described.b[i] = pack(factors.b)
    return described


class _Group(NamedTuple):
    name: str
    factors: list[LoraFactors | None]


def _groups(adapter: LoraAdapter, layer: int) -> Iterator[_Group]:
    for name, members in _GROUPS.items():
        yield _Group(name, [adapter.factors(f"layers.{layer}.{member}") for member in members])


def _weight_type(dtype: str) -> WeightType:
    return WeightType.BFLOAT16 if dtype == "bfloat16" else WeightType.FLOAT32
