"""Float32 values of this process, packed as csrc/cpu/packed.h lays out a matrix."""

from __future__ import annotations

import ctypes

import numpy as np

from engine.kernels.decoder_abi import PackParams, SourceType, WeightType
from engine.kernels.library import KernelLibrary
from engine.loading.packed_weights import PackedMatrix
from engine.loading.stored_tensor import FloatArray

_ALIGNMENT = 64


def packed_bytes(library: KernelLibrary, weight_type: WeightType, n: int, k: int) -> int:
    """What a packed matrix `[n, k]` takes."""
    needed = ctypes.c_int64()
    if library.symbols.quire_packed_bytes(weight_type.value, n, k, ctypes.byref(needed)):
        library.raise_last_error("packed_bytes")
    return needed.value


def pack_floats(
    library: KernelLibrary, values: FloatArray, weight_type: WeightType, num_threads: int = 1
) -> PackedMatrix:
    """Pack `[n, k]`, converted to `weight_type`. Raises KernelError."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    n, k = values.shape
    num_bytes = packed_bytes(library, weight_type, n, k)
    packed = np.empty(num_bytes + _ALIGNMENT, dtype=np.uint8)
    packed = packed[-packed.ctypes.data % _ALIGNMENT :][:num_bytes]
    params = PackParams()
    params.source, params.source_bytes = values.ctypes.data, values.nbytes
    params.packed, params.packed_bytes = packed.ctypes.data, num_bytes
    params.source_type, params.weight_type = SourceType.F32.value, weight_type.value
    params.num_rows, params.num_columns = params.source_rows, params.source_columns = n, k
    params.num_threads = num_threads
    if library.symbols.quire_pack(ctypes.byref(params)):
        library.raise_last_error("pack")
    return PackedMatrix(weight_type, n, k, packed)
