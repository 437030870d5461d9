"""Weights packed for the native CPU engine, once a node: a file that its processes map.

The file is named by the checkpoint's content and by how it was packed, so that it never needs to be compared. It holds
a header (JSON), then each matrix as csrc/cpu/packed.h lays it out and each vector as float32, at multiples of 64 bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from engine.errors import ModelLoadError
from engine.int32_buffer import Int32Array
from engine.kernels.decoder_abi import PackParams, SourceType, WeightType
from engine.kernels.library import KernelLibrary
from engine.loading.checkpoint import Checkpoint
from engine.loading.decoder_weights import DecoderWeights, MatrixSlot, VectorSlot, decoder_weights
from engine.loading.matching import match_tensors
from engine.loading.node_cache import CachedFile, cache_folder, make_once, reserve
from engine.loading.stored_tensor import ByteArray, FloatArray, StoredTensor
from engine.model_config import ModelConfig
from engine.parallel import DecoderShard

logger = logging.getLogger(__name__)

# Part of the file's name: to be raised when the layout changes.
_FORMAT = 1
_ALIGNMENT = 64

# The packed type that keeps a quantised type's codes.
_NATIVE_TYPES = {
    "Q4_0": WeightType.U4,
    "Q4_1": WeightType.U4_MIN,
    "Q4_K": WeightType.U4_MIN,
    "Q5_0": WeightType.U5,
    "Q5_1": WeightType.U5_MIN,
    "Q5_K": WeightType.U5_MIN,
    "Q6_K": WeightType.U6_16,
    "Q8_0": WeightType.U8,
}

ProgressCallback = Callable[[int, int], None]


class WeightPolicy(NamedTuple):
    """How matrices are packed.

    Attributes:
        quantization: "none" converts all to `dtype`, "int8" to 8 bits with a scale for 32 values, "native" keeps the
            codes of quantised types and converts the others to `dtype`.
        dtype: "float32" or "bfloat16".
    """

    quantization: str
    dtype: str

    def weight_type(self, stored_type: str) -> WeightType:
        if self.quantization == "int8":
            return WeightType.U8
        if self.quantization == "native" and stored_type in _NATIVE_TYPES:
            return _NATIVE_TYPES[stored_type]
        return WeightType.BFLOAT16 if self.dtype == "bfloat16" else WeightType.FLOAT32


class PackedMatrix(NamedTuple):
    type: WeightType
    n: int
    k: int
    data: ByteArray


class PackedWeights:
    """The weights of one decoder in memory that stays mapped as long as this object lives.

    Attributes:
        matrices, vectors: by the keys of `decoder_weights`.
        shared: they lie in a file that other processes map too.

    Args:
        file: of the node's cache, in use as long as this object lives.
    """

    def __init__(self, memory: mmap.mmap, file: CachedFile | None = None) -> None:
        self._file = file
        self.shared = file is not None
        buffer = np.frombuffer(memory, dtype=np.uint8)
        header_bytes = int(buffer[:8].view(np.uint64)[0])
        header = json.loads(bytes(buffer[8 : 8 + header_bytes]))
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, FloatArray] = {}
        for key, entry in header["matrices"].items():
            data = buffer[entry["offset"] : entry["offset"] + entry["bytes"]]
            self.matrices[key] = PackedMatrix(WeightType(entry["type"]), entry["n"], entry["k"], data)
        for key, entry in header["vectors"].items():
            data = buffer[entry["offset"] : entry["offset"] + entry["bytes"]]
            self.vectors[key] = data.view(np.float32).reshape(entry["shape"])


def load_packed_weights(
    checkpoint: Checkpoint,
    config: ModelConfig,
    policy: WeightPolicy,
    library: KernelLibrary,
    num_threads: int,
    progress: ProgressCallback | None = None,
    shard: DecoderShard | None = None,
) -> PackedWeights:
    """Map the checkpoint's packed weights, after packing them unless a process of this node has done it before.

    Args:
        shard: one rank's part, which has a file of its own; None is all.

    Where the node's cache cannot be written, they are packed into this process' own memory.

    Raises:
        ModelLoadError: a tensor is missing, doubled, unknown or of another shape than the configuration says.
    """
    packer = _Packer(checkpoint, decoder_weights(config, shard), policy, library, num_threads, progress)
    try:
        cached = make_once(_cache_path(checkpoint, policy, shard), partial(packer.write, reserve=reserve))
        return PackedWeights(mmap.mmap(cached.fd, 0, access=mmap.ACCESS_READ), cached)
    except OSError as error:
        logger.warning("the packed weights cannot be shared with other processes of this node: %s", error)
    with os.fdopen(os.memfd_create("quire-weights"), "w+b") as file:  # pages, so aligned like the mapped file
        packer.write(file)
        file.flush()
        return PackedWeights(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def has_quantized_weights(checkpoint: Checkpoint) -> bool:
    """Whether `quantization: native` differs from "none"."""
    return not checkpoint.weight_types().isdisjoint(_NATIVE_TYPES)


def _cache_path(checkpoint: Checkpoint, policy: WeightPolicy, shard: DecoderShard | None) -> Path:
    identity = f"{_FORMAT} {checkpoint.fingerprint} {policy.quantization} {policy.dtype}"
    if shard is not None and shard.world_size > 1:
        identity += f" {shard}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return cache_folder() / "packed" / f"{checkpoint.name}-{name}.bin"


class _Entry(NamedTuple):
    slot: MatrixSlot | VectorSlot
    type: WeightType | None
    offset: int
    bytes: int


class _Packer:
    def __init__(
        self,
        checkpoint: Checkpoint,
        table: DecoderWeights,
        policy: WeightPolicy,
        library: KernelLibrary,
        num_threads: int,
        progress: ProgressCallback | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._table = table
        self._policy = policy
        self._library = library
        self._num_threads = num_threads
        self._progress = progress

    def write(self, file: BinaryIO, reserve: Callable[[int, list[range]], None] | None = None) -> None:
        """Pack all weights, in the order of the table. `reserve` is told the file's size before anything is written."""
        tensors = self._read()
        entries, header = self._lay_out(tensors)
        if reserve is not None:
            reserve(file.fileno(), [range(max((entry.offset + entry.bytes for entry in entries), default=0))])
        file.write(len(header).to_bytes(8, "little") + header)
        written = 8 + len(header)
        total = sum(entry.bytes for entry in entries)
        done = 0
        for entry in entries:
            file.write(bytes(entry.offset - written))
            file.write(self._pack(entry, tensors[entry.slot.tensor]).tobytes())
            written = entry.offset + entry.bytes
            done += entry.bytes
            if self._progress is not None:
                self._progress(done, total)

    def _read(self) -> dict[str, StoredTensor]:
        stored = ((tensor.name, tensor) for tensor in self._checkpoint.stored_tensors())
        matched = match_tensors(
            self._checkpoint.source,
            self._table.architecture,
            stored,
            self._table.tensor_shapes(),
            self._table.unused,
            self._table.base_model_prefix,
        )
        return {name: tensor for name, tensor in matched if tensor is not None}

    def _lay_out(self, tensors: dict[str, StoredTensor]) -> tuple[list[_Entry], bytes]:
        """Where each weight goes, and the header that says so. The header's own size is settled by padding it."""
        sizes: list[tuple[MatrixSlot | VectorSlot, WeightType | None, int]] = []
        for matrix in self._table.matrices:
            weight_type = self._policy.weight_type(tensors[matrix.tensor].type)
            sizes.append((matrix, weight_type, self._packed_bytes(weight_type, matrix)))
        sizes.extend((vector, None, 4 * math.prod(vector.shape)) for vector in self._table.vectors)
        room = 4096 + 160 * len(sizes)  # of the header
        entries = []
        offset = _align(room)
        for slot, packed_type, num_bytes in sizes:
            entries.append(_Entry(slot, packed_type, offset, num_bytes))
            offset = _align(offset + num_bytes)
        header = json.dumps({"matrices": dict(_matrix_headers(entries)), "vectors": dict(_vector_headers(entries))})
        assert len(header) + 8 <= room
        return entries, header.ljust(room - 8).encode()

    def _packed_bytes(self, weight_type: WeightType, slot: MatrixSlot) -> int:
        needed = ctypes.c_int64()
        if self._library.symbols.quire_packed_bytes(weight_type.value, slot.n, slot.k, ctypes.byref(needed)):
            self._library.raise_last_error("packed_bytes")
        return needed.value

    def _pack(self, entry: _Entry, tensor: StoredTensor) -> ByteArray | FloatArray:
        slot = entry.slot
        if isinstance(slot, VectorSlot):
            values = tensor.floats()[slot.first_row : slot.first_row + slot.shape[0]] + np.float32(slot.offset)
            return np.ascontiguousarray(values)
        assert entry.type is not None
        return self._pack_matrix(slot, entry.type, entry.bytes, tensor)

    def _pack_matrix(
        self, slot: MatrixSlot, weight_type: WeightType, num_bytes: int, tensor: StoredTensor
    ) -> ByteArray:
        packed = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
        packed = packed[-packed.ctypes.data % _ALIGNMENT :][:num_bytes]
        order = _row_order(slot, tensor)
        params = PackParams()
        params.source, params.source_bytes = tensor.data.ctypes.data, tensor.data.nbytes
        params.row_order = None if order is None else order.ctypes.data
        params.packed, params.packed_bytes = packed.ctypes.data, num_bytes
        params.source_type, params.weight_type = SourceType[tensor.type].value, weight_type.value
        params.num_rows, params.num_columns, params.first_column = slot.n, slot.k, slot.first_column
        params.source_rows, params.source_columns = slot.source_rows, slot.source_columns
        params.transposed, params.num_threads = int(slot.transposed), self._num_threads
        if self._library.symbols.quire_pack(ctypes.byref(params)):
            raise ModelLoadError(f"{self._checkpoint.source}: tensor {tensor.name}: {self._library.last_error()}")
        return packed


def _row_order(slot: MatrixSlot, tensor: StoredTensor) -> Int32Array | None:
    if tensor.row_order is not None:
        return np.ascontiguousarray(tensor.row_order[slot.first_row : slot.first_row + slot.n])
    if slot.first_row == 0:
        return None
    return np.arange(slot.first_row, slot.first_row + slot.n, dtype=np.int32)


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _matrix_headers(entries: list[_Entry]) -> Iterator[tuple[str, dict[str, int]]]:
    for slot, weight_type, offset, num_bytes in entries:
        if isinstance(slot, MatrixSlot):
            assert weight_type is not None
            yield (
                slot.key,
                {"offset": offset, "bytes": num_bytes, "type": weight_type.value, "n": slot.n, "k": slot.k},
            )


def _vector_headers(entries: list[_Entry]) -> Iterator[tuple[str, dict[str, int | tuple[int, ...]]]]:
    for slot, _, offset, num_bytes in entries:
        if isinstance(slot, VectorSlot):
            yield slot.key, {"offset": offset, "bytes": num_bytes, "shape": slot.shape}
