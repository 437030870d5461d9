"""The structs of csrc/include/quire_decoder.h, field for field."""

from __future__ import annotations

import ctypes
from enum import IntEnum

from engine.kernels.abi import Params

_POINTER, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_F32, _F64 = ctypes.c_float, ctypes.c_double
_HEADER = [("size", ctypes.c_uint32), ("abi_version", ctypes.c_uint32)]


class SourceType(IntEnum):
    """QuireSourceType."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


class WeightType(IntEnum):
    """QuireWeightType."""

    FLOAT32 = 0
    BFLOAT16 = 1
    U4 = 2
    U4_MIN = 3
    U5 = 4
    U5_MIN = 5
    U6_16 = 6
    U8 = 7


class KVType(IntEnum):
    """QuireKVType."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2


class Activation(IntEnum):
    """QuireActivation."""

    SILU = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3


class PackParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("source", _POINTER),
        ("row_order", _POINTER),
        ("packed", _POINTER),
        ("source_bytes", _I64),
        ("packed_bytes", _I64),
        ("source_type", _I32),
        ("weight_type", _I32),
        ("num_rows", _I32),
        ("num_columns", _I32),
        ("source_rows", _I32),
        ("source_columns", _I32),
        ("first_column", _I32),
        ("transposed", _I32),
        ("num_threads", _I32),
        ("reserved", _I32),
    ]


class Weight(ctypes.Structure):
    _fields_ = [
        ("data", _POINTER),
        ("bias", _POINTER),
        ("type", _I32),
        ("n", _I32),
        ("k", _I32),
        ("reserved", _I32),
    ]


class Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("bias", _POINTER)]


class DecoderLayer(ctypes.Structure):
    _fields_ = [
        ("query", Weight),
        ("key", Weight),
        ("value", Weight),
        ("attention_out", Weight),
        ("gate", Weight),
        ("up", Weight),
        ("down", Weight),
        ("attention_norm", Norm),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("attention_out_norm", Norm),
        ("mlp_norm", Norm),
        ("mlp_out_norm", Norm),
        ("cos_sin", _POINTER),
        ("sliding_window", _I32),
        ("reserved", _I32),
    ]


class DecoderParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("layers", ctypes.POINTER(DecoderLayer)),
        ("communicator", _POINTER),
        ("vocab_starts", _POINTER),
        ("embedding", Weight),
        ("head", Weight),
        ("project_in", Weight),
        ("project_out", Weight),
        ("positions", _POINTER),
        ("final_norm", Norm),
        ("kv_pool", _POINTER),
        ("num_layers", _I32),
        ("vocab_size", _I32),
        ("embedding_dim", _I32),
        ("hidden_size", _I32),
        ("intermediate_size", _I32),
        ("num_heads", _I32),
        ("num_kv_heads", _I32),
        ("head_dim", _I32),
        ("max_positions", _I32),
        ("activation", _I32),
        ("layer_norm", _I32),
        ("post_norm", _I32),
        ("kv_type", _I32),
        ("num_blocks", _I32),
        ("block_size", _I32),
        ("norm_eps", _F32),
        ("embedding_scale", _F32),
        ("attention_scale", _F32),
    ]


class Sample(ctypes.Structure):
    _fields_ = [
        ("logits", _POINTER),
        ("candidates", _POINTER),
        ("draw", _F64),
        ("log_normalizer", _F64),
        ("row", _I32),
        ("num_candidates", _I32),
        ("wants_normalizer", _I32),
        ("top_k", _I32),
        ("temperature", _F32),
        ("top_p", _F32),
        ("min_p", _F32),
        ("token_id", _I32),
        ("token_logit", _F32),
        ("reserved", _I32),
    ]


class StepTimes(ctypes.Structure):
    _fields_ = [
        ("matrices", _I64),
        ("head", _I64),
        ("attention", _I64),
        ("communication", _I64),
        ("other", _I64),
        ("total", _I64),
    ]


class AdapterGroup(ctypes.Structure):
    _fields_ = [("a", Weight), ("b", Weight * 3)]


class AdapterLayer(ctypes.Structure):
    _fields_ = [
        ("attention_in", AdapterGroup),
        ("attention_out", AdapterGroup),
        ("mlp_in", AdapterGroup),
        ("down", AdapterGroup),
    ]


class AdapterParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("layers", ctypes.POINTER(AdapterLayer)),
        ("num_layers", _I32),
        ("slot", _I32),
    ]


class StepParams(Params):
    _fields_ = [  # noqa: RUF012
        *_HEADER,
        ("token_ids", _POINTER),
        ("query_start_loc", _POINTER),
        ("seq_lens", _POINTER),
        ("block_tables", _POINTER),
        ("logits_rows", _POINTER),
        ("adapter_slots", _POINTER),
        ("samples", _POINTER),
        ("times", ctypes.POINTER(StepTimes)),
        ("block_table_stride", _I64),
        ("num_tokens", _I32),
        ("num_seqs", _I32),
        ("max_blocks", _I32),
        ("num_logits_rows", _I32),
        ("num_samples", _I32),
        ("num_threads", _I32),
    ]
