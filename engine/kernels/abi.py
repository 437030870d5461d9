"""The parameter structs of csrc/include/quire.h, field for field."""

from __future__ import annotations

import ctypes

ABI_VERSION = 3

_POINTER, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_HEADER = [("size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32)]


class CacheView(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("block_stride", _I64), ("head_stride", _I64), ("slot_stride", _I64)]


class Params(ctypes.Structure):
    """Base of the call structs: every instance is born with its size and the ABI version."""

    def __init__(self) -> None:
        super().__init__()
        self.size = ctypes.sizeof(self)
        self.abi_version = ABI_VERSION


class RmsNormParams(Params):
    _fields_ = [
        *_HEADER,
        ("x", _POINTER),
        ("weight", _POINTER),
        ("out", _POINTER),
        ("stream", _POINTER),
        ("x_row_stride", _I64),
        ("x_group_stride", _I64),
        ("num_rows", _I32),
        ("num_groups", _I32),
        ("dim", _I32),
        ("dtype", _I32),
        ("eps", _F32),
        ("num_threads", _I32),
    ]


class AddRmsNormParams(Params):
    _fields_ = [
        *_HEADER,
        ("x", _POINTER),
        ("residual", _POINTER),
        ("weight", _POINTER),
        ("out", _POINTER),
        ("stream", _POINTER),
        ("x_row_stride", _I64),
        ("residual_row_stride", _I64),
        ("num_rows", _I32),
        ("dim", _I32),
        ("dtype", _I32),
        ("eps", _F32),
        ("num_threads", _I32),
        ("reserved", _I32),
    ]


class SiluAndMulParams(Params):
    _fields_ = [
        *_HEADER,
        ("gate_up", _POINTER),
        ("out", _POINTER),
        ("stream", _POINTER),
        ("gate_up_row_stride", _I64),
        ("num_rows", _I32),
        ("dim", _I32),
        ("dtype", _I32),
        ("num_threads", _I32),
    ]


class RotateAndCacheParams(Params):
    _fields_ = [
        *_HEADER,
        ("query", _POINTER),
        ("key", _POINTER),
        ("value", _POINTER),
        ("cos_sin", _POINTER),
        ("positions", _POINTER),
        ("slot_mapping", _POINTER),
        ("stream", _POINTER),
        ("key_cache", CacheView),
        ("value_cache", CacheView),
        ("query_token_stride", _I64),
        ("query_head_stride", _I64),
        ("key_token_stride", _I64),
        ("key_head_stride", _I64),
        ("value_token_stride", _I64),
        ("value_head_stride", _I64),
        ("num_tokens", _I32),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("num_blocks", _I32),
        ("block_size", _I32),
        ("max_positions", _I32),
        ("dtype", _I32),
        ("cache_dtype", _I32),
        ("num_threads", _I32),
    ]


class PagedAttentionParams(Params):
    _fields_ = [
        *_HEADER,
        ("query", _POINTER),
        ("out", _POINTER),
        ("query_start_loc", _POINTER),
        ("seq_lens", _POINTER),
        ("block_tables", _POINTER),
        ("workspace", _POINTER),
        ("stream", _POINTER),
        ("key_cache", CacheView),
        ("value_cache", CacheView),
        ("query_token_stride", _I64),
        ("query_head_stride", _I64),
        ("block_table_stride", _I64),
        ("workspace_bytes", _I64),
        ("num_tokens", _I32),
        ("num_seqs", _I32),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("num_blocks", _I32),
        ("block_size", _I32),
        ("max_blocks", _I32),
        ("max_query_len", _I32),
        ("max_seq_len", _I32),
        ("sliding_window", _I32),
        ("scale", _F32),
        ("dtype", _I32),
        ("cache_dtype", _I32),
        ("num_threads", _I32),
        ("split_tokens", _I32),
    ]


class CopyBlocksParams(Params):
    _fields_ = [
        *_HEADER,
        ("pool", _POINTER),
        ("pairs", _POINTER),
        ("stream", _POINTER),
        ("block_bytes", _I64),
        ("num_blocks", _I32),
        ("num_pairs", _I32),
        ("num_threads", _I32),
        ("reserved", _I32),
    ]


# Symbol and struct of each operation, the same in every library.
OPERATIONS: dict[str, type[Params]] = {
    "rms_norm": RmsNormParams,
    "add_rms_norm": AddRmsNormParams,
    "silu_and_mul": SiluAndMulParams,
    "rotate_and_cache": RotateAndCacheParams,
    "paged_attention": PagedAttentionParams,
    "copy_blocks": CopyBlocksParams,
}
