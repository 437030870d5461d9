"""The machine's ceilings, measured by the kernel library."""

from __future__ import annotations

import pytest

from benchmarks.cpu.machine import MachineRates, best_of, mean_of, measure_machine
from engine.kernels.library import KernelError, load_library

needs_library = pytest.mark.skipif(load_library("cpu").library is None, reason="needs the native CPU kernels")


@needs_library
def test_rates_are_plausible() -> None:
    (rates,) = measure_machine(1, num_bytes=8 << 20)
    assert 1e8 < rates.bytes_per_s < 1e13
    assert all(1e8 < rate < 1e14 for rate in rates.operations_per_s.values())


@needs_library
def test_an_array_too_small_is_refused() -> None:
    with pytest.raises(KernelError, match="bytes=1000 must be from"):
        measure_machine(1, num_bytes=1000)


def test_the_ceiling_is_the_best_of_all_numbers_of_threads() -> None:
    one = MachineRates(1, 20e9, {"float32": 100e9, "int8": 400e9})
    two = MachineRates(2, 18e9, {"float32": 190e9, "int8": 390e9})
    best = best_of([one, two])
    assert best == MachineRates(2, 20e9, {"float32": 190e9, "int8": 400e9})
    assert best.fastest("bfloat16") == 190e9, "a machine without bfloat16 products multiplies in float32"


def test_the_mean_of_readings() -> None:
    one, two = (
        MachineRates(2, 10.0, {"float32": 1.0, "int8": 4.0}),
        MachineRates(2, 20.0, {"float32": 3.0, "int8": 4.0}),
    )
    assert mean_of([one, two]) == MachineRates(2, 15.0, {"float32": 2.0, "int8": 4.0})
