"""Packed weights read back: through the embedding, and through products with unit vectors."""

from __future__ import annotations

import ctypes
import zlib
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.kernels.cpu import CpuBackend
from engine.kernels.decoder_abi import SourceType, WeightType
from engine.kernels.library import KernelError, KernelLibrary
from engine.loading.gguf_dequantize import _DECODERS
from tests.engine.kernels.table_decoder import Array, Packed, TableDecoder, aligned, pack, pack_floats, pack_params

QUANTISED = {
    "Q4_0": WeightType.U4,
    "Q4_1": WeightType.U4_MIN,
    "Q5_0": WeightType.U5,
    "Q5_1": WeightType.U5_MIN,
    "Q8_0": WeightType.U8,
    "Q4_K": WeightType.U4_MIN,
    "Q5_K": WeightType.U5_MIN,
    "Q6_K": WeightType.U6_16,
}
FLOATS: dict[str, Any] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONVERTED = (WeightType.FLOAT32, WeightType.BFLOAT16, WeightType.U8)


def random_blocks(name: str, rows: int, columns: int) -> tuple[Array, Array]:
    """Bytes of a quantised type, scales apart random, and the values that they stand for."""
    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = rng.integers(0, 256, (rows * columns // block_size, block_bytes), dtype=np.uint8)
    for start in {"Q6_K": [208]}.get(name, [0, 2] if name.endswith(("_1", "_K")) else [0]):
        scales = (rng.choice([-1, 1], len(blocks)) * rng.uniform(0.5, 2.0, len(blocks))).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    values = _DECODERS[name](torch.from_numpy(blocks)).numpy()
    return blocks.reshape(rows, -1), values.reshape(rows, columns)


def random_floats(name: str, rows: int, columns: int) -> tuple[Array, Array]:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(FLOATS[name])
    return values.view(torch.uint8).numpy(), values.float().numpy()


def as_embedding(library: KernelLibrary, matrix: Packed) -> Array:
    """The matrix, which must be at least as high as wide, by looking up each of its rows."""
    head = pack_floats(library, np.eye(matrix.n, matrix.k))
    return TableDecoder(library, matrix, head).logits(range(matrix.n))[:, : matrix.k]


def as_factor(library: KernelLibrary, matrix: Packed) -> Array:
    """The matrix, at least as high as wide, by multiplying it with each unit vector."""
    embedding = pack_floats(library, np.eye(matrix.n, matrix.k))
    return TableDecoder(library, embedding, matrix).logits(range(matrix.k)).T


def check(library: KernelLibrary, matrix: Packed, values: Array, bound: Array | float = 0.0) -> None:
    """Within `bound`, or equal; products with rows of 8 bits, where 1 is 127 / 127, within rounding."""
    looked_up = as_embedding(library, matrix)
    np.testing.assert_array_less(np.abs(looked_up - values), bound + np.finfo(np.float32).tiny)
    np.testing.assert_allclose(as_factor(library, matrix), looked_up, rtol=1e-5, atol=1e-5 * np.abs(values).max())


def row_maxima(values: Array, group: int) -> Array:
    """The largest magnitude of each group of a row, at each of its elements."""
    rows, columns = values.shape
    padded = np.pad(np.abs(values), ((0, 0), (0, -columns % group)))
    largest = padded.reshape(rows, -1, group).max(axis=2)
    return np.repeat(largest, group, axis=1)[:, :columns]


def bound_of(values: Array, weight_type: WeightType) -> Array | float:
    if weight_type is WeightType.FLOAT32:
        return 0.0
    # Half a unit of 8 bits, or half a step of a 127th of the largest of 32 with its scale rounded to 11 bits.
    return np.abs(values) * 2.0**-8 if weight_type is WeightType.BFLOAT16 else row_maxima(values, 32) * (0.51 / 127)


@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_kept(name: str, backend: CpuBackend) -> None:
    """On every instruction set. Scales of K types, products of two, are rounded to float16, the others not at all."""
    raw, values = random_blocks(name, 264, 256)
    matrix = pack(backend.library, raw, SourceType[name], QUANTISED[name], 264, 256)
    check(backend.library, matrix, values, row_maxima(values, 256) * 2.0**-9 if name.endswith("_K") else 0.0)


@pytest.mark.parametrize("weight_type", CONVERTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "Q8_0"])
def test_codes_are_converted(name: str, weight_type: WeightType, cpu: CpuBackend) -> None:
    raw, values = random_blocks(name, 264, 256)
    matrix = pack(cpu.library, raw, SourceType[name], weight_type, 264, 256)
    rounding = np.abs(values).max() * 1e-6 if name == "Q6_K" else 0.0  # its values have more than 24 bits
    check(cpu.library, matrix, values, bound_of(values, weight_type) + rounding)


@pytest.mark.parametrize("weight_type", CONVERTED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(("rows", "columns"), [(96, 64), (83, 77), (17, 3)])
def test_floats_are_converted(rows: int, columns: int, name: str, weight_type: WeightType, backend: CpuBackend) -> None:
    """Into full panels and records and not, on every instruction set."""
    raw, values = random_floats(name, rows, columns)
    matrix = pack(backend.library, raw, SourceType[name], weight_type, rows, columns)
    check(backend.library, matrix, values, bound_of(values, weight_type))
    if weight_type is WeightType.BFLOAT16:
        rounded = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        np.testing.assert_array_equal(as_embedding(backend.library, matrix), rounded)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q5_0", "Q6_K"])
def test_rows_come_in_the_order_asked_for(name: str, cpu: CpuBackend) -> None:
    """Of a fused matrix, some rows, out of order and one of them twice."""
    raw, values = (random_floats if name in FLOATS else random_blocks)(name, 600, 256)
    order = np.random.default_rng(0).permutation(600)[:270].astype(np.int32)
    order[3] = order[100]
    kinds = {"source_rows": 600, "row_order": order}
    weight_type = QUANTISED.get(name, WeightType.FLOAT32)
    matrix = pack(cpu.library, raw, SourceType[name], weight_type, 270, 256, **kinds)
    whole = pack(cpu.library, raw, SourceType[name], weight_type, 600, 256)
    np.testing.assert_array_equal(as_embedding(cpu.library, matrix), as_embedding(cpu.library, whole)[order])
    np.testing.assert_allclose(as_embedding(cpu.library, matrix), values[order], atol=np.abs(values).max() * 2.0**-9)


@pytest.mark.parametrize("name", ["F32", "BF16", "Q5_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("packed", ["kept", "int8"])
def test_columns_from_a_border_of_32_on(name: str, packed: str, cpu: CpuBackend) -> None:
    """A rank's part along K, which for the K types lies within a block of 256."""
    raw, _ = (random_floats if name in FLOATS else random_blocks)(name, 800, 768)
    weight_type = WeightType.U8 if packed == "int8" else QUANTISED.get(name, WeightType.FLOAT32)
    part = pack(cpu.library, raw, SourceType[name], weight_type, 800, 352, source_columns=768, first_column=224)
    whole = as_embedding(cpu.library, pack(cpu.library, raw, SourceType[name], weight_type, 800, 768))
    np.testing.assert_array_equal(as_embedding(cpu.library, part), whole[:, 224:576])


@pytest.mark.parametrize("name", FLOATS)
def test_columns_of_a_transposed_source(name: str, cpu: CpuBackend) -> None:
    raw, values = random_floats(name, 40, 150)
    options: dict[str, Any] = {"source_columns": 40, "first_column": 13, "transposed": True}
    matrix = pack(cpu.library, raw, SourceType[name], WeightType.FLOAT32, 150, 19, **options)
    np.testing.assert_array_equal(as_embedding(cpu.library, matrix), values.T[:, 13:32])


@pytest.mark.parametrize("name", FLOATS)
def test_transposed_sources(name: str, cpu: CpuBackend) -> None:
    """As GPT-2 stores its layers: [k, source_rows], here a later third of a fused one."""
    raw, values = random_floats(name, 40, 150)
    order = np.arange(50, 100, dtype=np.int32)
    options: dict[str, Any] = {"source_rows": 150, "row_order": order, "transposed": True}
    matrix = pack(cpu.library, raw, SourceType[name], WeightType.FLOAT32, 50, 40, **options)
    np.testing.assert_array_equal(as_embedding(cpu.library, matrix), values.T[50:100])


@pytest.mark.parametrize("name", QUANTISED)
def test_products_of_the_largest_codes_do_not_saturate(name: str, backend: CpuBackend) -> None:
    """Rows of codes ±127 times weights of the highest and the lowest codes, at which 16-bit sums would overflow."""
    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 256, 512
    raw = np.empty((rows, columns // block_size, block_bytes), dtype=np.uint8)
    raw[: rows // 2] = 0x7F if name == "Q8_0" else 0xFF
    raw[rows // 2 :] = 0x81 if name == "Q8_0" else 0
    if name == "Q6_K":
        raw[..., 192:208] = 1
    one = np.array([0.25], dtype=np.float16).view(np.uint8)
    for start in {"Q6_K": [208]}.get(name, [0, 2] if name.endswith(("_1", "_K")) else [0]):
        raw[..., start : start + 2] = one
    if name in ("Q4_K", "Q5_K"):
        raw[..., 4:16] = 0x21
    values = _DECODERS[name](torch.from_numpy(raw.reshape(-1, block_bytes))).numpy().reshape(rows, columns)
    signs = np.ones((rows, columns), dtype=np.float32)
    signs[1], signs[2, ::2], signs[3, 1::2] = -1, -1, -1
    head = pack(backend.library, raw.reshape(rows, -1), SourceType[name], QUANTISED[name], rows, columns)
    logits = TableDecoder(backend.library, pack_floats(backend.library, signs), head).logits(range(4))
    exact = signs[:4].astype(np.float64) @ values.T.astype(np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5 * np.abs(values).max() * columns)


@pytest.mark.parametrize(
    ("source_type", "weight_type", "changes", "message"),
    [
        (SourceType.F32, WeightType.U4, {}, "no way from source_type=0 to weight_type=2"),
        (SourceType.Q4_0, WeightType.U5, {}, "no way from source_type=2 to weight_type=4"),
        (SourceType.Q6_K, WeightType.U6_16, {}, "source_columns=64 is no multiple of the source's blocks of 256"),
        (SourceType.Q8_0, WeightType.U8, {"num_columns": 48}, "columns 0 to 48 of blocks are not at borders of 32"),
        (SourceType.Q8_0, WeightType.U8, {"num_columns": 32, "first_column": 16}, "columns 16 to 48 of blocks"),
        (SourceType.F32, WeightType.FLOAT32, {"num_columns": 32, "first_column": 33}, "first_column=33"),
        (SourceType.F32, WeightType.FLOAT32, {"source_columns": 63}, "source_columns=63"),
        (SourceType.Q8_0, WeightType.U8, {"transposed": 1}, "a transposed source must be F32, F16 or BF16"),
        (SourceType.F32, WeightType.FLOAT32, {"source_type": 9}, "source_type=9"),
        (SourceType.F32, WeightType.FLOAT32, {"weight_type": 8}, "weight_type=8"),
        (SourceType.F32, WeightType.FLOAT32, {"source_bytes": 16 * 64 * 4 - 1}, "source_bytes=4095"),
        (SourceType.F32, WeightType.FLOAT32, {"packed_bytes": 16 * 64 * 4 - 1}, "packed_bytes=4095"),
        (SourceType.F32, WeightType.FLOAT32, {"num_rows": 0}, "num_rows=0"),
        (SourceType.F32, WeightType.FLOAT32, {"num_columns": 0}, "num_columns=0"),
        (SourceType.F32, WeightType.FLOAT32, {"source_rows": 15}, "source_rows=15"),
        (SourceType.F32, WeightType.FLOAT32, {"num_threads": 0}, "num_threads=0"),
        (SourceType.F32, WeightType.FLOAT32, {"source": None}, "source is NULL"),
        (SourceType.F32, WeightType.FLOAT32, {"packed": None}, "packed is NULL"),
        (SourceType.F32, WeightType.FLOAT32, {"size": 8}, "8"),
        (SourceType.F32, WeightType.FLOAT32, {"abi_version": 0}, "0"),
    ],
)
def test_what_cannot_be_packed_is_named(
    source_type: SourceType, weight_type: WeightType, changes: dict[str, Any], message: str, cpu: CpuBackend
) -> None:
    source, packed = np.zeros(16 * 64 * 4, dtype=np.uint8), aligned(16 * 64 * 4)
    packed[:] = 7
    params = pack_params(source, packed, source_type, weight_type, 16, 64)
    for field, value in changes.items():
        setattr(params, field, value)
    assert cpu.library.symbols.quire_pack(ctypes.byref(params)) != 0
    with pytest.raises(KernelError, match=message):
        cpu.library.raise_last_error("pack")
    assert (packed == 7).all(), "something was written"


@pytest.mark.parametrize("row", [-1, 16])
def test_a_row_outside_the_source_is_named(row: int, cpu: CpuBackend) -> None:
    order = np.array([0, row], dtype=np.int32)
    with pytest.raises(KernelError, match=f"row_order={row}"):
        pack(cpu.library, np.zeros((16, 8), np.float32), SourceType.F32, WeightType.FLOAT32, 2, 8, row_order=order)
