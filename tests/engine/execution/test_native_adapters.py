"""Adapters in a native decoder's slots: what they take, and what C++ refuses before it computes."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.adapters import AdapterChanges, AdapterLoad, LoraAdapter
from engine.execution.native_adapters import adapter_bytes
from engine.execution.native_runner import NativeModelRunner
from engine.kernels.decoder_abi import AdapterLayer, Weight, WeightType
from engine.kernels.library import KernelError
from engine.loading.pack_floats import pack_floats
from engine.scheduling import ScheduledSequence, SchedulerOutput
from tests.engine.adapters.peft import read, write_adapter, write_base
from tests.engine.execution.native import native_runner

NO_TOKENS = np.zeros(1, dtype=np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def runner(base: str) -> NativeModelRunner:
    return native_runner(base, dtype="float32")


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> LoraAdapter:
    return read(write_adapter(tmp_path, base, rank=5), base)


def step(slot: int) -> SchedulerOutput:
    return SchedulerOutput((ScheduledSequence(0, 0, NO_TOKENS, NO_TOKENS, (), slot),))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_takes_what_was_announced(dtype: str, base: str, adapter: LoraAdapter) -> None:
    adapters = native_runner(base, dtype=dtype)._adapters
    assert adapters is not None
    adapters.apply(AdapterChanges(loads=(AdapterLoad(3, adapter),)))
    packed = sum(matrix.data.nbytes for matrix in adapters._kept[3])
    assert packed == adapter_bytes(adapters._library, adapter, dtype)
    adapters.apply(AdapterChanges(drops=(3,)))
    assert not adapters._kept


def test_a_step_of_an_empty_slot_is_refused(runner: NativeModelRunner, adapter: LoraAdapter) -> None:
    assert runner._adapters is not None
    with pytest.raises(KernelError, match="adapter_slots"):
        runner.run(step(7))
    runner._adapters.apply(AdapterChanges(loads=(AdapterLoad(7, adapter),)))
    runner.run(step(7))
    runner._adapters.apply(AdapterChanges(drops=(7,)))
    with pytest.raises(KernelError, match="adapter slot 7 is empty"):
        runner.run(step(7))
    with pytest.raises(KernelError, match="adapter_slots"):
        runner.run(step(-2))


def weight(runner: NativeModelRunner, kept: list[Any], n: int, k: int, kind: WeightType = WeightType.FLOAT32) -> Weight:
    assert runner._adapters is not None
    matrix = pack_floats(runner._adapters._library, np.zeros((n, k), dtype=np.float32), kind)
    kept.append(matrix)
    return Weight(matrix.data.ctypes.data, None, kind.value, n, k)


@pytest.mark.parametrize(
    ("a", "b", "index", "why"),
    [
        ((4, 63), (64, 4), 0, r"a of attention_in is \[4, 63\], expected \[4, 64\]"),
        ((4, 64), (60, 4), 0, r"b of attention_in is \[60, 4\], expected \[64, 4\]"),
        ((5, 64), (64, 4), 0, r"a of attention_in is \[5, 64\], expected \[4, 64\]"),
        ((4, 64), None, 0, r"a of attention_in is \[4, 64\], expected \[0, 64\]"),
        (None, (32, 4), 2, "a of attention_in is missing"),
    ],
)
def test_tables_that_do_not_fit_the_decoder(
    a: tuple[int, int] | None, b: tuple[int, int] | None, index: int, why: str, runner: NativeModelRunner
) -> None:
    kept: list[Any] = []
    layers = (AdapterLayer * 2)()
    if a is not None:
        layers[1].attention_in.a = weight(runner, kept, *a)
    if b is not None:
        layers[1].attention_in.b[index] = weight(runner, kept, *b)
    with pytest.raises(KernelError, match=why):
        runner._decoder.set_adapter(0, layers)


def test_other_types_layers_and_slots_are_refused(runner: NativeModelRunner) -> None:
    kept: list[Any] = []
    layers = (AdapterLayer * 2)()
    layers[0].down.a, layers[0].down.b[0] = (
        weight(runner, kept, 4, 160),
        weight(runner, kept, 64, 4, WeightType.BFLOAT16),
    )
    with pytest.raises(KernelError, match="an adapter is all float32 or all bfloat16"):
        runner._decoder.set_adapter(0, layers)
    layers[0].down.b[0] = Weight()
    layers[0].down.a = Weight()
    layers[0].down.b[1] = weight(runner, kept, 64, 4)
    with pytest.raises(KernelError, match="a matrix that the decoder has not"):
        runner._decoder.set_adapter(0, layers)
    with pytest.raises(KernelError, match="num_layers"):
        runner._decoder.set_adapter(0, (AdapterLayer * 1)())
    with pytest.raises(KernelError, match="slot"):
        runner._decoder.set_adapter(4096, None)
    assert ctypes.sizeof(AdapterLayer) == 4 * 4 * ctypes.sizeof(Weight)
