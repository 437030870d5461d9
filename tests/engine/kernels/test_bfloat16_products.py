"""Rows times bfloat16 weights, on every instruction set: AVX-512 BF16 rounds the rows and multiplies pairs of bfloat16,
the others widen the weights."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from engine.kernels.cpu import CpuBackend
from engine.kernels.decoder_abi import WeightType
from tests.engine.kernels.table_decoder import Array, TableDecoder, pack_floats

# Pairs with and without an odd value at the end, vectors and records of rows with and without a rest.
WIDTHS = (1, 2, 3, 16, 31, 64, 77, 200)
NUM_ROWS, NUM_COLUMNS = 30, 40


@cache
def values(columns: int) -> tuple[Array, Array]:
    """Rows, which bfloat16 does not hold, and weights, which it does."""
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(NUM_COLUMNS, columns, generator=generator).bfloat16().float()
    return torch.randn(NUM_COLUMNS, columns, generator=generator).numpy(), weights.numpy()


def rounded(x: Array) -> Array:
    return torch.from_numpy(x).bfloat16().float().numpy()


def decoder(backend: CpuBackend, columns: int, weight_type: WeightType) -> TableDecoder:
    rows, weights = values(columns)
    library = backend.library
    return TableDecoder(library, pack_floats(library, rows), pack_floats(library, weights, weight_type))


def product(rows: Array, weights: Array) -> Array:
    return (rows.astype(np.float64) @ weights.T.astype(np.float64))[:NUM_ROWS]


def assert_sums(found: Array, rows: Array, weights: Array) -> None:
    """Equal to the exact sums but for rounding in float32, which grows with the terms' magnitudes."""
    bound = 1e-6 * (1.0 + product(np.abs(rows), np.abs(weights)))
    np.testing.assert_array_less(np.abs(found - product(rows, weights)), bound)


@pytest.mark.parametrize("columns", WIDTHS)
def test_bfloat16_weights(columns: int, backend: CpuBackend, isa: str) -> None:
    rows, weights = values(columns)
    logits = decoder(backend, columns, WeightType.BFLOAT16).logits(range(NUM_ROWS))
    assert_sums(logits, rounded(rows) if isa == "avx512_bf16" else rows, weights)


@pytest.mark.parametrize("columns", WIDTHS)
def test_float32_weights_meet_rows_that_are_not_rounded(columns: int, backend: CpuBackend) -> None:
    rows, weights = values(columns)
    assert_sums(decoder(backend, columns, WeightType.FLOAT32).logits(range(NUM_ROWS)), rows, weights)


@pytest.mark.parametrize("columns", [3, 77, 200])
def test_a_row_does_not_depend_on_those_beside_it(columns: int, backend: CpuBackend) -> None:
    """Bit by bit, in tiles of every number of rows."""
    table = decoder(backend, columns, WeightType.BFLOAT16)
    alone = np.concatenate([table.logits([row]) for row in range(NUM_ROWS)])
    for count in range(2, NUM_ROWS + 1):
        np.testing.assert_array_equal(table.logits(range(count)), alone[:count])
