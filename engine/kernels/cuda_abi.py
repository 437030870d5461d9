"""The structs of csrc/include/quire_cuda.h, field for field."""

from __future__ import annotations

import ctypes

import numpy as np

from engine.kernels.abi import Params

MAX_CANDIDATES = 1024
SWAP_COPY_ENGINE, SWAP_KERNEL = 0, 1

_POINTER, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_HEADER = [("size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32)]

DRAW = np.dtype(
    [
        ("seed", np.uint64),
        ("sample_index", np.uint64),
        ("position", np.uint64),
        ("top_p", np.float64),
        ("sharpness", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("row", np.int32),
        ("num_candidates", np.int32),
        ("wants_normalizer", np.int32),
    ]
)
DRAWN = np.dtype(
    [
        ("mass", np.uint64),
        ("token_id", np.int32),
        ("token_logit", np.float32),
        ("largest", np.float32),
        ("reserved", np.int32),
    ]
)
CANDIDATE = np.dtype([("logit", np.float32), ("token_id", np.int32)])
ADJUSTMENT = np.dtype([("token_id", np.int32), ("count", np.int32), ("seen", np.int32), ("bias", np.float32)])
ADJUSTED_ROW = np.dtype(
    [
        ("frequency_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("repetition_penalty", np.float32),
        ("first", np.int32),
        ("num_adjustments", np.int32),
        ("awaited", np.int32),
    ]
)
# What `mass` counts a probability of one as.
ONE = 2.0**44


class SampleParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("logits", _POINTER),
        ("draws", _POINTER),
        ("drawn", _POINTER),
        ("candidates", _POINTER),
        ("stream", _POINTER),
        ("logits_row_stride", _I64),
        ("num_draws", _I32),
        ("vocab_size", _I32),
        ("max_candidates", _I32),
        ("dtype", _I32),
        ("num_threads", _I32),
        ("reserved", _I32),
    ]


class AdjustLogitsParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("logits", _POINTER),
        ("rows", _POINTER),
        ("adjustments", _POINTER),
        ("drawn", _POINTER),
        ("stream", _POINTER),
        ("num_rows", _I32),
        ("vocab_size", _I32),
        ("num_threads", _I32),
        ("reserved", _I32),
    ]


class SwapBlocksParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("device_pool", _POINTER),
        ("host_pool", _POINTER),
        ("pairs", _POINTER),
        ("stream", _POINTER),
        ("block_bytes", _I64),
        ("num_device_blocks", _I64),
        ("num_host_blocks", _I64),
        ("num_pairs", _I32),
        ("to_host", _I32),
        ("method", _I32),
        ("num_threads", _I32),
    ]


# Symbol and struct of each operation.
OPERATIONS: dict[str, type[Params]] = {
    "sample": SampleParams,
    "adjust_logits": AdjustLogitsParams,
    "swap_blocks": SwapBlocksParams,
}
