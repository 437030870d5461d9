"""A native decoder that adds nothing to a token's embedding: its logits are `embedding[token] @ head.T + bias`.

So each matrix can be read back through what computes with it, and any logits can be given to the sampler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.execution.native_samples import SAMPLE
from engine.kernels.decoder_abi import (
    DecoderLayer,
    DecoderParams,
    Norm,
    PackParams,
    SourceType,
    StepParams,
    Weight,
    WeightType,
)
from engine.kernels.library import KernelLibrary

Array = npt.NDArray[Any]
BLOCK_SIZE, NUM_BLOCKS, MAX_POSITIONS = 4, 8, 30


class Packed(NamedTuple):
    type: WeightType
    n: int
    k: int
    data: Array


def aligned(num_bytes: int) -> Array:
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    return memory[-memory.ctypes.data % 64 :][:num_bytes]


def pack_params(
    source: Array,
    packed: Array,
    source_type: SourceType,
    weight_type: WeightType,
    n: int,
    k: int,
    source_rows: int | None = None,
    row_order: Array | None = None,
    transposed: bool = False,
    source_columns: int | None = None,
    first_column: int = 0,
) -> PackParams:
    params = PackParams()
    params.source, params.source_bytes = source.ctypes.data, source.nbytes
    params.row_order = None if row_order is None else row_order.ctypes.data
    params.packed, params.packed_bytes = packed.ctypes.data, packed.nbytes
    params.source_type, params.weight_type = source_type.value, weight_type.value
    params.num_rows, params.num_columns = n, k
    params.source_rows = n if source_rows is None else source_rows
    params.source_columns = k if source_columns is None else source_columns
    params.first_column = first_column
    params.transposed, params.num_threads = int(transposed), 2
    return params


def packed_bytes(library: KernelLibrary, weight_type: WeightType, n: int, k: int) -> int:
    needed = ctypes.c_int64()
    assert library.symbols.quire_packed_bytes(weight_type.value, n, k, ctypes.byref(needed)) == 0
    return needed.value


def pack(
    library: KernelLibrary,
    source: Array,
    source_type: SourceType,
    weight_type: WeightType,
    n: int,
    k: int,
    **options: Any,
) -> Packed:
    """Raises KernelError, as the library says it."""
    packed = aligned(packed_bytes(library, weight_type, n, k))
    params = pack_params(source, packed, source_type, weight_type, n, k, **options)
    if library.symbols.quire_pack(ctypes.byref(params)):
        library.raise_last_error("pack")
    return Packed(weight_type, n, k, packed)


def pack_floats(library: KernelLibrary, values: Array, weight_type: WeightType = WeightType.FLOAT32) -> Packed:
    n, k = values.shape
    return pack(library, np.ascontiguousarray(values, dtype=np.float32), SourceType.F32, weight_type, n, k)


class TableDecoder:
    """One layer of zero weights between `embedding` and `head`, `[vocab_size, dim]` both."""

    def __init__(self, library: KernelLibrary, embedding: Packed, head: Packed, bias: Array | None = None) -> None:
        self.library = library
        self.vocab_size, dim = head.n, head.k
        self._bias = None if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        self._weights = embedding, head
        self._ones = np.ones(dim, dtype=np.float32)
        self._zeros = {
            shape: pack_floats(library, np.zeros(shape)) for shape in ((2, dim), (dim, 2), (16, dim), (dim, 16))
        }
        self.kv_pool = np.full((NUM_BLOCKS, 2 * 4 * 2 * BLOCK_SIZE), 0xFF, dtype=np.uint8)
        self.params = self._describe(embedding, head)
        self._handle = ctypes.c_void_p()
        if library.symbols.quire_decoder_create(ctypes.byref(self.params), ctypes.byref(self._handle)):
            library.raise_last_error("decoder_create")

    def __del__(self) -> None:
        if self._handle:
            self.library.symbols.quire_decoder_destroy(self._handle)

    def run(self, params: StepParams) -> None:
        if self.library.symbols.quire_decoder_step(self._handle, ctypes.byref(params)):
            self.library.raise_last_error("decoder_step")

    def logits(self, token_ids: Sequence[int]) -> Array:
        """`[len(token_ids), vocab_size]`, computed in steps of one sequence that begins anew."""
        rows = [self._step(token_ids[at : at + 30]) for at in range(0, len(token_ids), 30)]
        return np.concatenate(rows)

    def _step(self, token_ids: Sequence[int]) -> Array:
        count = len(token_ids)
        logits = np.empty((count, self.vocab_size), dtype=np.float32)
        samples = np.zeros(count, dtype=SAMPLE)
        samples["row"], samples["top_p"] = np.arange(count), 1.0
        samples["logits"] = logits.ctypes.data + np.arange(count) * logits.strides[0]
        self.run(Step(token_ids, samples).params)
        return logits

    def _describe(self, embedding: Packed, head: Packed) -> DecoderParams:
        params, layer, dim = DecoderParams(), DecoderLayer(), head.k
        layer.query = layer.key = layer.value = _weight(self._zeros[2, dim])
        layer.attention_out = _weight(self._zeros[dim, 2])
        layer.up, layer.down = _weight(self._zeros[16, dim]), _weight(self._zeros[dim, 16])
        layer.attention_norm = layer.mlp_norm = Norm(self._ones.ctypes.data, None)
        params.layers = (DecoderLayer * 1)(layer)
        params.embedding, params.head = _weight(embedding), _weight(head)
        if self._bias is not None:
            params.head.bias = self._bias.ctypes.data
        params.kv_pool, params.num_blocks, params.block_size = self.kv_pool.ctypes.data, NUM_BLOCKS, BLOCK_SIZE
        params.num_layers, params.vocab_size, params.intermediate_size = 1, head.n, 16
        params.embedding_dim = params.hidden_size = dim
        params.num_heads, params.num_kv_heads, params.head_dim = 1, 1, 2
        params.max_positions = MAX_POSITIONS
        params.norm_eps, params.embedding_scale, params.attention_scale = 1e-6, 1.0, 1.0
        return params


class Step:
    """StepParams of one sequence from its start, and the arrays that they point to."""

    def __init__(self, token_ids: Sequence[int], samples: Array) -> None:
        count = len(token_ids)
        self.token_ids = np.array(token_ids, dtype=np.int32)
        self.query_start_loc = np.array([0, count], dtype=np.int32)
        self.seq_lens = np.array([count], dtype=np.int32)
        self.block_tables = np.arange(NUM_BLOCKS, dtype=np.int32)[None]
        self.logits_rows = np.arange(count, dtype=np.int32)
        self.samples = samples
        params = self.params = StepParams()
        for name in ("token_ids", "query_start_loc", "seq_lens", "block_tables", "logits_rows", "samples"):
            setattr(params, name, getattr(self, name).ctypes.data)
        params.block_table_stride = params.max_blocks = NUM_BLOCKS
        params.num_tokens, params.num_seqs, params.num_threads = count, 1, 2
        params.num_logits_rows, params.num_samples = count, len(samples)


def _weight(packed: Packed) -> Weight:
    return Weight(packed.data.ctypes.data, None, packed.type.value, packed.n, packed.k)
