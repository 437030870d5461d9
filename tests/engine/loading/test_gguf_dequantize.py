"""Every quantised type against gguf's own (NumPy) decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.errors import UnsupportedModelError
from engine.loading.gguf_dequantize import dequantize
from engine.loading.gguf_reader import TENSOR_TYPES, GGUFFile

Kind = gguf.GGMLQuantizationType
ROWS, COLUMNS = 129, 2048  # more than one chunk, and an uneven last one


def kind_of(name: str) -> Kind:
    return next(kind for kind in Kind if kind.name == name)


def raw_blocks(kind: Kind) -> np.ndarray[Any, Any]:
    """Random bytes, but scales that are finite: gguf cannot quantise to the K types, only decode them."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (ROWS, COLUMNS // block_size, block_bytes), dtype=np.uint8)
    halves = {"Q6_K": [208]}.get(kind.name, [0, 2] if kind.name.endswith(("_1", "_K")) else [0])
    for start in halves:
        scales = rng.normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[..., start : start + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def write(path: Path, kind: Kind, raw: np.ndarray[Any, Any]) -> GGUFFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("before", np.zeros(3, np.float32))
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize("name", sorted(known.name for known in TENSOR_TYPES.values()))
def test_equals_gguf(name: str, tmp_path: Path) -> None:
    kind = kind_of(name)
    if name.startswith("Q"):
        raw = raw_blocks(kind)
    else:
        raw = gguf.quants.quantize(np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32), kind)
    file = write(tmp_path / "x.gguf", kind, raw)
    tensor = file.tensors["x"]
    assert tensor.shape == (ROWS, COLUMNS)
    decoded = dequantize(file.data, tensor)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert decoded.shape == (ROWS, COLUMNS)
    assert decoded.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
    torch.testing.assert_close(decoded.float(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_come_back_close(name: str, tmp_path: Path) -> None:
    """Independent of gguf's decoder: what was quantised must return within a step of the quantisation."""
    values = np.random.default_rng(1).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    file = write(tmp_path / "x.gguf", kind_of(name), gguf.quants.quantize(values, kind_of(name)))
    decoded = dequantize(file.data, file.tensors["x"])
    steps = {"Q4_0": 8, "Q4_1": 7.5, "Q5_0": 16, "Q5_1": 15.5, "Q8_0": 127}
    assert (decoded - torch.from_numpy(values)).abs().max() < 1.1 * np.abs(values).max() / steps[name]


def test_other_types_are_named(tmp_path: Path) -> None:
    raw = np.zeros((2, 256 // 256 * 84), dtype=np.uint8)
    with pytest.raises(UnsupportedModelError, match="type Q2_K of tensor x is not supported; supported: BF16, F16"):
        write(tmp_path / "x.gguf", Kind.Q2_K, raw)
