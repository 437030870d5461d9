"""The counter-based generator behind every random draw: Philox4x32-10 (Salmon et al., SC'11).

A draw is a pure function of (seed, sample index, position), so a sequence goes on with the same tokens wherever and
with whomever it runs: after preemption, in another batch, on another replica. No state is kept or sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from engine.scheduling import SampleRequest

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def draws_of(requests: Sequence[SampleRequest]) -> list[float]:
    """The number in [0, 1) that each request draws with. 0.0 for all if all are greedy, and none will be used."""
    if all(request.sampling_params.greedy for request in requests):
        return [0.0] * len(requests)
    keys = [(request.seed, request.sample_index, request.position) for request in requests]
    seeds, indices, positions = np.array(keys, dtype=np.uint64).T
    draws: list[float] = uniform(seeds, indices, positions).tolist()
    return draws


def uniform(
    seeds: npt.NDArray[np.uint64], sample_indices: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each row, 53 random bits. All arguments `[rows]`."""
    words = philox4x32(seeds, positions, sample_indices)
    bits = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def philox4x32(
    keys: npt.NDArray[np.uint64], counters_low: npt.NDArray[np.uint64], counters_high: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Four 32-bit words a row, each in a uint64. A 64-bit key and a counter of two 64-bit halves, `[rows]` each."""
    key0, key1 = keys & _LOW, keys >> _HALF
    c0, c1 = counters_low & _LOW, counters_low >> _HALF
    c2, c3 = counters_high & _LOW, counters_high >> _HALF
    for _ in range(_ROUNDS):
        product0 = _MULTIPLIERS[0] * c0
        product1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ key0,
            product1 & _LOW,
            (product0 >> _HALF) ^ c3 ^ key1,
            product0 & _LOW,
        )
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3
