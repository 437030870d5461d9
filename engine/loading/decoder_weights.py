"""A decoder's weights as a flat table: what the native engine wants, and from which tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import UnsupportedModelError
from engine.loading.weight_names import WEIGHT_NAMES, WeightNames
from engine.model_config import ModelConfig
from engine.parallel import DecoderShard, split_decoder


class MatrixSlot(NamedTuple):
    """A matrix `[n, k]` that is multiplied: rows from `first_row` and columns from `first_column` on of a tensor.

    Attributes:
        key: its name in the native engine, such as "layers.3.query".
        source_rows: rows of the tensor, all fused matrices' together.
        source_columns: columns of the tensor, all ranks' together.
        transposed: the tensor is stored as `[source_columns, source_rows]`.
    """

    key: str
    tensor: str
    n: int
    k: int
    first_row: int
    first_column: int
    source_rows: int
    source_columns: int
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, int]:
        shape = self.source_rows, self.source_columns
        return shape[::-1] if self.transposed else shape

    @classmethod
    def whole(cls, key: str, tensor: str, n: int, k: int) -> MatrixSlot:
        return cls(key, tensor, n, k, 0, 0, n, k, transposed=False)


class VectorSlot(NamedTuple):
    """Plain floats: a norm, a bias, or a table of positions; rows `first_row` to `first_row + shape[0]` of a tensor."""

    key: str
    tensor: str
    shape: tuple[int, ...]
    first_row: int
    tensor_shape: tuple[int, ...]
    offset: float = 0.0  # added to each value


class Linear(NamedTuple):
    """A matrix of a decoder layer: rows and columns of a linear layer's tensor, whose name is without ".weight".

    Attributes:
        key: its name in the native engine; `tensor` may be that of several, fused.
        rows, columns: this rank's part.
    """

    key: str
    tensor: str
    rows: range
    columns: range
    source_rows: int
    source_columns: int


class DecoderWeights(NamedTuple):
    matrices: tuple[MatrixSlot, ...]
    vectors: tuple[VectorSlot, ...]
    unused: frozenset[str]
    base_model_prefix: str
    architecture: str

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the checkpoint by name."""
        slots: list[MatrixSlot | VectorSlot] = [*self.matrices, *self.vectors]
        return {slot.tensor: slot.tensor_shape for slot in slots}


def decoder_weights(config: ModelConfig, shard: DecoderShard | None = None) -> DecoderWeights:
    """The table of a model, or of one rank's part of it: `config` is the whole model's either way. What is summed over
    the ranks has its bias on rank 0. Raises UnsupportedModelError for an unknown architecture."""
    if config.architecture not in WEIGHT_NAMES:
        raise UnsupportedModelError(f"architecture {config.architecture}", WEIGHT_NAMES)
    table = _Table(config, WEIGHT_NAMES[config.architecture], shard or split_decoder(config, 1)[0])
    names, hidden, embedding = table.names, config.hidden_size, config.embedding_size
    matrices = [table.embedding("embedding", names.embed_tokens)]
    vectors: list[VectorSlot] = []
    if not config.tie_word_embeddings:
        matrices.append(table.embedding("head", names.lm_head))
    if embedding != hidden:
        matrices.append(MatrixSlot.whole("project_in", f"{names.project_in}.weight", hidden, embedding))
        matrices.append(MatrixSlot.whole("project_out", f"{names.project_out}.weight", embedding, hidden))
    if config.position_embedding == "learned":
        shape = (config.max_position_embeddings + config.position_offset, hidden)
        vectors.append(VectorSlot("positions", f"{names.embed_positions}.weight", shape, 0, shape))
    for layer in range(config.num_layers):
        matrices.extend(table.layer_matrices(layer))
        vectors.extend(table.layer_vectors(layer))
    if config.final_norm:
        vectors.extend(table.norm("final_norm", names.final_norm, hidden))
    unused = [f"{names.layer.format(i)}.{name}" for i in range(config.num_layers) for name in names.layer_buffers]
    unused.extend(table.other_ranks_biases())
    if config.tie_word_embeddings:
        unused.append(f"{names.lm_head}.weight")
    return DecoderWeights(
        tuple(matrices), tuple(vectors), frozenset(unused), names.base_model_prefix, config.architecture
    )


def decoder_linears(config: ModelConfig, shard: DecoderShard | None = None) -> Iterator[Linear]:
    """The matrices of all decoder layers, or one rank's part of them. Raises UnsupportedModelError."""
    if config.architecture not in WEIGHT_NAMES:
        raise UnsupportedModelError(f"architecture {config.architecture}", WEIGHT_NAMES)
    table = _Table(config, WEIGHT_NAMES[config.architecture], shard or split_decoder(config, 1)[0])
    for layer in range(config.num_layers):
        yield from table.linears(layer)


class _Table:
    def __init__(self, config: ModelConfig, names: WeightNames, shard: DecoderShard) -> None:
        self.config = config
        self.names = names
        self.shard = shard

    def embedding(self, key: str, name: str) -> MatrixSlot:
        vocab, size, width = self.shard.vocab, self.config.vocab_size, self.config.embedding_size
        return MatrixSlot(key, f"{name}.weight", len(vocab), width, vocab.start, 0, size, width, transposed=False)

    def norm(self, key: str, name: str, dim: int, bias: bool | None = None) -> Iterator[VectorSlot]:
        offset = self.config.norm_weight_offset
        yield VectorSlot(f"{key}.weight", f"{name}.weight", (dim,), 0, (dim,), offset)
        if self.config.norm == "layer_norm" if bias is None else bias:
            yield VectorSlot(f"{key}.bias", f"{name}.bias", (dim,), 0, (dim,))

    def layer_matrices(self, layer: int) -> Iterator[MatrixSlot]:
        for key, tensor, rows, columns, source_rows, source_columns in self.linears(layer):
            yield MatrixSlot(
                key,
                f"{tensor}.weight",
                len(rows),
                len(columns),
                rows.start,
                columns.start,
                source_rows,
                source_columns,
                self.names.transposed,
            )

    def layer_vectors(self, layer: int) -> Iterator[VectorSlot]:
        config, names, prefix = self.config, self.names, self.names.layer.format(layer)
        key, hidden = f"layers.{layer}", config.hidden_size
        yield from self.norm(f"{key}.attention_norm", f"{prefix}.{names.attention_norm}", hidden)
        yield from self.norm(f"{key}.mlp_norm", f"{prefix}.{names.mlp_norm}", hidden)
        if config.norm_placement == "sandwich":
            yield from self.norm(f"{key}.attention_out_norm", f"{prefix}.{names.attention_out_norm}", hidden)
            yield from self.norm(f"{key}.mlp_out_norm", f"{prefix}.{names.mlp_out_norm}", hidden)
        if config.qk_norm:
            yield from self.norm(f"{key}.query_norm", f"{prefix}.{names.q_norm}", config.head_dim, bias=False)
            yield from self.norm(f"{key}.key_norm", f"{prefix}.{names.k_norm}", config.head_dim, bias=False)
        for linear in self.linears(layer):
            if self._is_biased(linear) and (self.shard.rank == 0 or not self._is_summed(linear)):
                yield VectorSlot(
                    f"{linear.key}.bias",
                    f"{linear.tensor}.bias",
                    (len(linear.rows),),
                    linear.rows.start,
                    (linear.source_rows,),
                )

    def other_ranks_biases(self) -> Iterator[str]:
        """Biases that are added once, on rank 0, and this is another."""
        if self.shard.rank == 0:
            return
        for layer in range(self.config.num_layers):
            for linear in self.linears(layer):
                if self._is_biased(linear) and self._is_summed(linear):
                    yield f"{linear.tensor}.bias"

    def _is_biased(self, linear: Linear) -> bool:
        name = linear.key.rpartition(".")[2]
        if name == "attention_out":
            return self.config.attention_out_bias
        return self.config.attention_bias if name in ("query", "key", "value") else self.config.mlp_bias

    @staticmethod
    def _is_summed(linear: Linear) -> bool:
        return linear.key.endswith((".attention_out", ".down"))

    def linears(self, layer: int) -> Iterator[Linear]:
        config, names, shard = self.config, self.names, self.shard
        hidden, head_dim = range(config.hidden_size), config.head_dim
        query, kv = _times(shard.query_heads, head_dim), _times(shard.kv_heads, head_dim)
        num_query, num_kv = config.num_heads * head_dim, config.num_kv_heads * head_dim
        mlp_in = ("gate", "up") if config.gated_mlp else ("up",)
        qkv_keys, inner = ("query", "key", "value"), config.intermediate_size
        prefix = names.layer.format(layer)
        yield from _fused(layer, qkv_keys, prefix, names.qkv, (query, kv, kv), (num_query, num_kv, num_kv), hidden)
        yield Linear(
            f"layers.{layer}.attention_out", f"{prefix}.{names.attention_out}", hidden, query, len(hidden), num_query
        )
        shards, widths = (shard.mlp,) * len(mlp_in), (inner,) * len(mlp_in)
        yield from _fused(layer, mlp_in, prefix, names.mlp_in, shards, widths, hidden)
        yield Linear(f"layers.{layer}.down", f"{prefix}.{names.mlp_out}", hidden, shard.mlp, len(hidden), inner)


def _fused(
    layer: int,
    keys: tuple[str, ...],
    prefix: str,
    tensors: tuple[str, ...],
    shards: tuple[range, ...],
    widths: tuple[int, ...],
    columns: range,
) -> Iterator[Linear]:
    """Layers of one input: a tensor each, or one that holds all of them, their rows one after the other."""
    fused = len(tensors) == 1
    first_row = 0
    for i, (key, rows, width) in enumerate(zip(keys, shards, widths, strict=True)):
        start = rows.start + (first_row if fused else 0)
        tensor = f"{prefix}.{tensors[0 if fused else i]}"
        source_rows = sum(widths) if fused else width
        yield Linear(
            f"layers.{layer}.{key}", tensor, range(start, start + len(rows)), columns, source_rows, len(columns)
        )
        first_row += width


def _times(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
