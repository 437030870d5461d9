"""The GGUF container, sound and damaged."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.gguf_reader import GGUFFile


def sample(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int32("a.i32", -7)
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.bool", True)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_string("a.string", "naïve 🎉")
    writer.add_array("a.strings", ["x", "", "Ġ"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    file = GGUFFile(sample(tmp_path / "x.gguf"))
    metadata = {key: value for key, value in file.metadata.items() if key.startswith("a.")}
    assert metadata == {
        "a.u32": 7,
        "a.i32": -7,
        "a.f32": 0.5,
        "a.f64": 0.25,
        "a.bool": True,
        "a.u64": 1 << 40,
        "a.string": "naïve 🎉",
        "a.strings": ["x", "", "Ġ"],
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -1.0],
    }
    tensor = file.tensors["t"]
    assert (tensor.shape, tensor.type.name, tensor.num_bytes) == ((2, 3), "F32", 24)
    assert struct.unpack_from("<6f", file.data, tensor.start) == (0, 1, 2, 3, 4, 5)


def test_typed_access(tmp_path: Path) -> None:
    file = GGUFFile(sample(tmp_path / "x.gguf"))
    assert file.get("a.u32", int) == 7
    assert file.get("a.u32", float) == 7.0
    assert file.get("nothing", str) is None
    with pytest.raises(ModelLoadError, match=r"metadata a\.string='naïve 🎉' is not of type int"):
        file.get("a.string", int)
    with pytest.raises(ModelLoadError, match="metadata nothing is missing"):
        file.required("nothing", int)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    data = sample(tmp_path / "x.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    end = GGUFFile(tmp_path / "x.gguf").tensors["t"]
    for keep in range(1, end.start + end.num_bytes):
        cut.write_bytes(data[:keep])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf: "):
            GGUFFile(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_byte_never_raises_anything_else(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "x.gguf"
    if not path.exists():
        sample(path)
    data = bytearray(path.read_bytes())
    data[min(position, len(data) - 1)] = value
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(data)
    with contextlib.suppress(ModelLoadError):
        GGUFFile(damaged)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    with pytest.raises(ModelLoadError, match="empty file"):
        GGUFFile(path)
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(UnsupportedModelError, match="GGUF version 1"):
        GGUFFile(path)
    with pytest.raises(ModelLoadError, match="no such file"):
        GGUFFile(tmp_path / "absent.gguf")


def test_a_damaged_array_length_is_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    data = sample(path).read_bytes()
    length = struct.pack("<IQ", 5, 3)  # int32, three of them: "a.ints"
    assert data.count(length) == 1
    path.write_bytes(data.replace(length, struct.pack("<IQ", 5, 1 << 62)))
    with pytest.raises(ModelLoadError, match="truncated"):
        GGUFFile(path)


@pytest.mark.parametrize("alignment", [0, 24])
def test_an_impossible_alignment(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint32("general.alignment", alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=f"alignment={alignment} must be a power of two"):
        GGUFFile(tmp_path / "x.gguf")
