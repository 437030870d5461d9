"""The GGUF container: a magic number, key-value metadata, tensor descriptions, then the tensors' bytes.

The `gguf` package's reader makes several objects for every token of the vocabulary and takes seconds to open a file;
replicas must start in less, so this one walks the metadata once and makes plain Python values.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.fingerprint import Span

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

_T = TypeVar("_T", bool, int, float, str)


class TensorType(NamedTuple):
    """How a GGML type packs its elements: `block_bytes` bytes hold `block_size` of them."""

    name: str
    block_size: int
    block_bytes: int


# By the type ids of the format; those that `dequantize` and Quire's models can use.
TENSOR_TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}
# Only to name them in the error.
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GGUFTensor(NamedTuple):
    """One tensor: its shape outermost first (the reverse of the file's order) and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    start: int
    num_bytes: int


class GGUFFile:
    """A mapped GGUF file. Raises ModelLoadError or UnsupportedModelError as it is opened.

    Attributes:
        metadata: scalars as Python numbers, strings as str, arrays as lists.
        tensors: by name, in the file's order.
        name: what errors call it.
        data: the whole file, mapped copy-on-write.
        header: the bytes of metadata and tensor descriptions.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        try:
            with path.open("rb") as file:
                # Copy-on-write pages count as writable, which torch asks of a buffer; nothing writes to them.
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise ModelLoadError(f"{self.name}: no such file") from None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelLoadError(f"{self.name}: {error}") from error
        cursor = _Cursor(self.data)
        try:
            num_tensors, num_fields = self._read_preamble(cursor)
            self.metadata: dict[str, Any] = {}
            for _ in range(num_fields):
                name = cursor.string()
                self.metadata[name] = cursor.value(cursor.scalar(_U32))
            infos = [self._read_tensor(cursor) for _ in range(num_tensors)]
        except _EndOfFileError:
            raise ModelLoadError(
                f"{self.name}: truncated: its header runs past the end at byte {len(self.data)}"
            ) from None
        except (ValueError, OverflowError) as error:
            raise ModelLoadError(f"{self.name}: corrupt header near byte {cursor.offset}: {error}") from error
        self.header = self.data[: cursor.offset]
        self.tensors = self._place(infos, cursor.offset)

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """A metadata value of one scalar type, or None where the key is absent."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelLoadError(f"{self.name}: metadata {key}={value!r} is not of type {kind.__name__}")
        return value

    def required(self, key: str, kind: type[_T]) -> _T:
        """As `get`, but a missing key is a ModelLoadError."""
        value = self.get(key, kind)
        if value is None:
            raise ModelLoadError(f"{self.name}: metadata {key} is missing")
        return value

    def spans(self) -> list[Span]:
        """Where each tensor lies, for the fingerprint."""
        return [Span(tensor.name, tensor.start, tensor.num_bytes) for tensor in self.tensors.values()]

    def _read_preamble(self, cursor: _Cursor) -> tuple[int, int]:
        if self.data[:4] != b"GGUF":
            raise ModelLoadError(f"{self.name}: not a GGUF file: it starts with {self.data[:4]!r}")
        cursor.offset = 4
        version = cursor.scalar(_U32)
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self.name}: GGUF version {version} (or byte order)", ["2", "3"])
        return cursor.scalar(_U64), cursor.scalar(_U64)

    def _read_tensor(self, cursor: _Cursor) -> GGUFTensor:
        """One description; `start` is still relative to the tensors' bytes."""
        name = cursor.string()
        num_dims = cursor.scalar(_U32)
        if num_dims > 4:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = tuple(cursor.scalar(_U64) for _ in range(num_dims))[::-1]
        type_id = cursor.scalar(_U32)
        start = cursor.scalar(_U64)
        if type_id not in TENSOR_TYPES:
            what = f"{self.name}: type {_OTHER_TYPES.get(type_id, type_id)} of tensor {name}"
            raise UnsupportedModelError(what, [known.name for known in TENSOR_TYPES.values()])
        tensor_type = TENSOR_TYPES[type_id]
        if not shape or shape[-1] % tensor_type.block_size:
            raise ValueError(f"rows of tensor {name} {list(shape)} are no whole blocks of {tensor_type.name}")
        num_bytes = math.prod(shape) // tensor_type.block_size * tensor_type.block_bytes
        return GGUFTensor(name, shape, tensor_type, start, num_bytes)

    def _place(self, infos: list[GGUFTensor], header_end: int) -> dict[str, GGUFTensor]:
        alignment = self.get("general.alignment", int)
        alignment = 32 if alignment is None else alignment
        if alignment < 1 or alignment & (alignment - 1):
            raise ModelLoadError(f"{self.name}: metadata general.alignment={alignment} must be a power of two")
        data_start = -(-header_end // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for info in infos:
            tensor = info._replace(start=data_start + info.start)
            end = tensor.start + tensor.num_bytes
            if end > len(self.data):
                raise ModelLoadError(
                    f"{self.name}: truncated: tensor {tensor.name} ends at byte {end}, the file at {len(self.data)}"
                )
            if tensor.name in tensors:
                raise ModelLoadError(f"{self.name}: tensor {tensor.name} occurs twice")
            tensors[tensor.name] = tensor
        return tensors


class _EndOfFileError(Exception):
    """The header wants bytes that the file does not have."""


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = 0

    def scalar(self, layout: struct.Struct) -> Any:
        try:
            (value,) = layout.unpack_from(self.data, self.offset)
        except struct.error:
            raise _EndOfFileError from None
        self.offset += layout.size
        return value

    def string(self) -> str:
        length = self.scalar(_U64)
        start, end = self.offset, self.offset + length
        if end > len(self.data):
            raise _EndOfFileError
        self.offset = end
        return self.data[start:end].decode("utf-8", "replace")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self.array()
        if type_id not in _SCALARS:
            raise ValueError(f"unknown metadata type {type_id}")
        return self.scalar(_SCALARS[type_id])

    def array(self) -> list[Any]:
        type_id, count = self.scalar(_U32), self.scalar(_U64)
        if type_id == _STRING:
            return self.strings(count)
        if type_id in _SCALARS:
            if count * _SCALARS[type_id].size > len(self.data) - self.offset:
                raise _EndOfFileError  # before a damaged count asks for terabytes
            layout = struct.Struct(f"<{count}{_SCALARS[type_id].format[1:]}")
            values = layout.unpack_from(self.data, self.offset)
            self.offset += layout.size
            return list(values)
        raise ValueError(f"unknown array element type {type_id}")

    def strings(self, count: int) -> list[str]:
        """Hundreds of thousands of them in a vocabulary: the one loop here that is worth its local names."""
        data, size = self.data, len(self.data)
        read_length: Callable[..., tuple[Any, ...]] = _U64.unpack_from
        offset = self.offset
        values = []
        for _ in range(count):
            if offset + 8 > size:
                raise _EndOfFileError
            start = offset + 8
            offset = start + read_length(data, offset)[0]
            if offset > size:
                raise _EndOfFileError
            values.append(data[start:offset].decode("utf-8", "replace"))
        self.offset = offset
        return values
