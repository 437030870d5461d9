"""What this machine can do at most, measured by the kernel library: memory bandwidth and dot-product rates."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from engine.kernels.library import KernelError, KernelsUnavailableError, load_library

RateKind = Literal["float32", "bfloat16", "int8"]
RATE_KINDS: tuple[RateKind, ...] = get_args(RateKind)  # in the order of QuireRateKind

BANDWIDTH_BYTES = 256 << 20  # several times any last-level cache that a machine of a few cores has
UNSUPPORTED = 2  # QUIRE_UNSUPPORTED


class MachineRates(NamedTuple):
    """Ceilings of one number of threads.

    Attributes:
        bytes_per_s: read from memory.
        operations_per_s: multiplications and additions, by the type multiplied; without those that the machine has no
            instruction for.
    """

    num_threads: int
    bytes_per_s: float
    operations_per_s: dict[RateKind, float]

    def fastest(self, kind: RateKind) -> float:
        """The rate of `kind`, or what a machine without it must convert to: float32."""
        return self.operations_per_s.get(kind, self.operations_per_s["float32"])

    def as_json(self) -> dict[str, float]:
        """In GB/s, and GFLOP/s or GOP/s."""
        rates = {f"{kind}_g_s": round(rate / 1e9, 1) for kind, rate in self.operations_per_s.items()}
        return {"num_threads": self.num_threads, "read_gb_s": round(self.bytes_per_s / 1e9, 2), **rates}


def measure_machine(max_threads: int, num_bytes: int = BANDWIDTH_BYTES) -> list[MachineRates]:
    """One entry for each number of threads from 1 to `max_threads`.

    Raises:
        KernelsUnavailableError: no CPU library, and so nothing to measure with.
    """
    loaded = load_library("cpu")
    if loaded.library is None:
        raise KernelsUnavailableError(f"the machine's rates cannot be measured: {loaded.reason}")
    return [_measure(loaded.library.symbols, num_threads, num_bytes) for num_threads in range(1, max_threads + 1)]


def best_of(measured: list[MachineRates]) -> MachineRates:
    """The ceiling over numbers of threads: of each rate the largest, since more threads need not read faster."""
    kinds = [kind for kind in RATE_KINDS if kind in measured[0].operations_per_s]
    return MachineRates(
        measured[-1].num_threads,
        max(rates.bytes_per_s for rates in measured),
        {kind: max(rates.operations_per_s[kind] for rates in measured) for kind in kinds},
    )


def mean_of(readings: Sequence[MachineRates]) -> MachineRates:
    """Of several readings of one machine: a virtual one's two processors may be one core's now and two cores' later."""
    first, count = readings[0], len(readings)
    return MachineRates(
        first.num_threads,
        sum(rates.bytes_per_s for rates in readings) / count,
        {kind: sum(rates.operations_per_s[kind] for rates in readings) / count for kind in first.operations_per_s},
    )


def _measure(symbols: ctypes.CDLL, num_threads: int, num_bytes: int) -> MachineRates:
    value = ctypes.c_double()
    status = symbols.quire_cpu_measure_bandwidth(ctypes.c_int64(num_bytes), num_threads, ctypes.byref(value))
    _check(symbols, status)
    bandwidth = value.value
    rates: dict[RateKind, float] = {}
    for index, kind in enumerate(RATE_KINDS):
        status = symbols.quire_cpu_measure_rate(index, num_threads, ctypes.byref(value))
        if status != UNSUPPORTED:
            _check(symbols, status)
            rates[kind] = value.value
    return MachineRates(num_threads, bandwidth, rates)


def _check(symbols: ctypes.CDLL, status: int) -> None:
    if status:
        message: bytes = symbols.quire_last_error()
        raise KernelError(message.decode())
