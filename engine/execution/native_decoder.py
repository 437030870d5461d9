"""The native decoder of csrc/cpu: a model described to it once, and one call a step."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import numpy as np

from engine.errors import CommunicatorError, ConfigError
from engine.kernels.communicator_abi import COMMUNICATION_FAILED
from engine.kernels.decoder_abi import (
    Activation,
    AdapterLayer,
    AdapterParams,
    DecoderLayer,
    DecoderParams,
    KVType,
    Norm,
    StepParams,
    Weight,
    WeightType,
)
from engine.kernels.library import KernelLibrary
from engine.loading.packed_weights import PackedWeights
from engine.loading.stored_tensor import ByteArray, FloatArray
from engine.model_config import ModelConfig, RopeScaling
from engine.parallel.shared_memory import SharedMemoryCommunicator

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "relu": Activation.RELU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
}
KV_TYPES = {"float32": KVType.FLOAT32, "bfloat16": KVType.BFLOAT16, "int8": KVType.INT8}
_LINEARS = ("query", "key", "value", "attention_out", "gate", "up", "down")
_NORMS = ("attention_norm", "query_norm", "key_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")


def kv_block_bytes(library: KernelLibrary, config: ModelConfig, kv_dtype: str, block_size: int) -> int:
    """Bytes of one block of all layers."""
    needed = ctypes.c_int64()
    status = library.symbols.quire_kv_block_bytes(
        KV_TYPES[kv_dtype].value,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        block_size,
        ctypes.byref(needed),
    )
    if status:
        library.raise_last_error("kv_block_bytes")
    return needed.value


class NativeDecoder:
    """A model over a KV pool.

    Args:
        weights: kept alive as long as the decoder.
        kv_pool: uint8 `[num_blocks, block_bytes]`, likewise.
        kv_dtype: "float32", "bfloat16" or "int8".
        block_size: tokens in a block.
        vocab_starts: the first token id of each rank's part of the vocabulary, and the vocabulary's size.
        communicator: of the ranks that hold the model together, `config` being `DecoderShard.config`'s; kept alive as
            long as the decoder.
    """

    def __init__(
        self,
        library: KernelLibrary,
        config: ModelConfig,
        weights: PackedWeights,
        kv_pool: ByteArray,
        kv_dtype: str,
        block_size: int,
        vocab_starts: Sequence[int] = (),
        communicator: SharedMemoryCommunicator | None = None,
    ) -> None:
        self._library = library
        self._weights = weights
        self._kv_pool = kv_pool
        self._communicator = communicator
        self._tables: list[FloatArray] = []  # what C++ holds pointers to
        self._handle = ctypes.c_void_p()
        params = self._describe(config)
        starts = np.array(vocab_starts, dtype=np.int32)
        if communicator is not None:
            params.communicator, params.vocab_starts = communicator.handle, starts.ctypes.data
        params.kv_pool, params.kv_type = kv_pool.ctypes.data, KV_TYPES[kv_dtype].value
        params.num_blocks, params.block_size = len(kv_pool), block_size
        if library.symbols.quire_decoder_create(ctypes.byref(params), ctypes.byref(self._handle)):
            raise ConfigError(f"the native engine cannot run this model: {library.last_error()}")

    def __del__(self) -> None:
        if self._handle:
            self._library.symbols.quire_decoder_destroy(self._handle)

    def step(self, params: StepParams) -> None:
        """Compute the rows of a step and fill its samples. Raises KernelError or CommunicatorError."""
        status = self._library.symbols.quire_decoder_step(self._handle, ctypes.byref(params))
        if status == COMMUNICATION_FAILED:
            raise CommunicatorError(self._library.last_error())
        if status:
            self._library.raise_last_error("decoder_step")

    def set_adapter(self, slot: int, layers: ctypes.Array[AdapterLayer] | None) -> None:
        """Put an adapter into a slot, or empty it with None. What the weights point to is the caller's to keep as long.

        Raises:
            KernelError: it does not fit the decoder.
        """
        params = AdapterParams()
        params.slot = slot
        if layers is not None:
            params.layers, params.num_layers = layers, len(layers)
        if self._library.symbols.quire_decoder_set_adapter(self._handle, ctypes.byref(params)):
            self._library.raise_last_error("decoder_set_adapter")

    def _describe(self, config: ModelConfig) -> DecoderParams:
        params = DecoderParams()
        layers = (DecoderLayer * config.num_layers)()
        tables = self._rotary_tables(config)
        for i, layer in enumerate(layers):
            for name in _LINEARS:
                setattr(layer, name, self._weight(f"layers.{i}.{name}"))
            for name in _NORMS:
                setattr(layer, name, self._norm(f"layers.{i}.{name}"))
            table = tables.get(config.is_local(i))
            layer.cos_sin = None if table is None else table.ctypes.data
            layer.sliding_window = config.window(i) or 0
        params.layers = layers
        params.embedding = self._weight("embedding")
        params.head = self._weight("embedding" if config.tie_word_embeddings else "head")
        params.project_in, params.project_out = self._weight("project_in"), self._weight("project_out")
        positions = self._weights.vectors.get("positions")
        if positions is not None:
            params.positions = positions.ctypes.data + 4 * config.position_offset * config.hidden_size
        params.final_norm = self._norm("final_norm")
        params.num_layers, params.vocab_size = config.num_layers, config.vocab_size
        params.embedding_dim, params.hidden_size = config.embedding_size, config.hidden_size
        params.intermediate_size, params.head_dim = config.intermediate_size, config.head_dim
        params.num_heads, params.num_kv_heads = config.num_heads, config.num_kv_heads
        params.max_positions = config.max_position_embeddings
        params.activation = _ACTIVATIONS[config.hidden_act].value
        params.layer_norm = int(config.norm == "layer_norm")
        params.post_norm = int(config.norm_placement == "post")
        params.norm_eps, params.attention_scale = config.norm_eps, config.attention_scale
        params.embedding_scale = self._embedding_scale(config)
        return params

    def _embedding_scale(self, config: ModelConfig) -> float:
        """Gemma's is rounded to the type that it was trained in."""
        if self._weights.matrices["embedding"].type is not WeightType.BFLOAT16:
            return config.embedding_scale
        bits = np.array([config.embedding_scale], dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return float(rounded.view(np.float32)[0])

    def _rotary_tables(self, config: ModelConfig) -> dict[bool, FloatArray]:
        if config.position_embedding != "rotary":
            return {}
        tables = {False: rotary_table(config, config.rope_theta, config.rope_scaling)}
        if config.rope_local_theta is not None:
            tables[True] = rotary_table(config, config.rope_local_theta, None)
        self._tables.extend(tables.values())
        return tables

    def _weight(self, key: str) -> Weight:
        """The description of a matrix, empty if the model has none of that name."""
        matrix = self._weights.matrices.get(key)
        if matrix is None:
            return Weight()
        bias = self._weights.vectors.get(f"{key}.bias")
        return Weight(
            matrix.data.ctypes.data, None if bias is None else bias.ctypes.data, matrix.type.value, matrix.n, matrix.k
        )

    def _norm(self, key: str) -> Norm:
        weight, bias = self._weights.vectors.get(f"{key}.weight"), self._weights.vectors.get(f"{key}.bias")
        return Norm(
            None if weight is None else weight.ctypes.data,
            None if bias is None else bias.ctypes.data,
        )


def rotary_table(config: ModelConfig, theta: float, scaling: RopeScaling | None) -> FloatArray:
    """float32 `[max_position_embeddings, head_dim]`: cosines of the `head_dim / 2` angles, then their sines.

    The angles are float32 products, as transformers computes them; see engine/layers/rotary.py, its twin in torch.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / theta ** exponents.astype(np.float64)).astype(np.float32)
    if scaling is not None:
        frequencies = _scaled(frequencies, scaling)
    positions = np.arange(config.max_position_embeddings, dtype=np.float32)
    angles = np.outer(positions, frequencies).astype(np.float64)
    table: FloatArray = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    return table


def _scaled(frequencies: FloatArray, scaling: RopeScaling) -> FloatArray:
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "per_frequency":
        factors: FloatArray = np.array(scaling.factors, dtype=np.float32)
        return frequencies / factors
    context, factor = scaling.original_max_position_embeddings, np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    ramp = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > context / low, frequencies / factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return np.where(between, ramp, scaled).astype(np.float32)
