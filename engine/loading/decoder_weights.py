"""A decoder's weights as a flat table: what the native engine wants, and from which tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from engine.errors import UnsupportedModelError
from engine.loading.weight_names import WEIGHT_NAMES, WeightNames
from engine.model_config import ModelConfig


class MatrixSlot(NamedTuple):
    """A matrix `[n, k]` that is multiplied: rows `first_row` to `first_row + n` of a tensor.

    Attributes:
        key: its name in the native engine, such as "layers.3.query".
        source_rows: rows of the tensor, all fused matrices' together.
        transposed: the tensor is stored as `[k, source_rows]`.
    """

    key: str
    tensor: str
    n: int
    k: int
    first_row: int
    source_rows: int
    transposed: bool

    @property
    def tensor_shape(self) -> tuple[int, int]:
        return (self.k, self.source_rows) if self.transposed else (self.source_rows, self.k)


class VectorSlot(NamedTuple):
    """Plain floats: a norm, a bias, or a table of positions; rows `first_row` to `first_row + shape[0]` of a tensor."""

    key: str
    tensor: str
    shape: tuple[int, ...]
    first_row: int
    tensor_shape: tuple[int, ...]
    offset: float = 0.0  # added to each value


class DecoderWeights(NamedTuple):
    matrices: tuple[MatrixSlot, ...]
    vectors: tuple[VectorSlot, ...]
    unused: frozenset[str]
    base_model_prefix: str

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the checkpoint by name."""
        slots: list[MatrixSlot | VectorSlot] = [*self.matrices, *self.vectors]
        return {slot.tensor: slot.tensor_shape for slot in slots}


def decoder_weights(config: ModelConfig) -> DecoderWeights:
    """The table of a model. Raises UnsupportedModelError for an unknown architecture."""
    if config.architecture not in WEIGHT_NAMES:
        raise UnsupportedModelError(f"architecture {config.architecture}", WEIGHT_NAMES)
    table = _Table(config, WEIGHT_NAMES[config.architecture])
    names, hidden, embedding = table.names, config.hidden_size, config.embedding_size
    matrices = [table.embedding("embedding", names.embed_tokens)]
    vectors: list[VectorSlot] = []
    if not config.tie_word_embeddings:
        matrices.append(table.embedding("head", names.lm_head))
    if embedding != hidden:
        matrices.append(MatrixSlot("project_in", f"{names.project_in}.weight", hidden, embedding, 0, hidden, False))
        matrices.append(
            MatrixSlot("project_out", f"{names.project_out}.weight", embedding, hidden, 0, embedding, False)
        )
    if config.position_embedding == "learned":
        shape = (config.max_position_embeddings + config.position_offset, hidden)
        vectors.append(VectorSlot("positions", f"{names.embed_positions}.weight", shape, 0, shape))
    for layer in range(config.num_layers):
        matrices.extend(table.layer_matrices(layer))
        vectors.extend(table.layer_vectors(layer))
    if config.final_norm:
        vectors.extend(table.norm("final_norm", names.final_norm, hidden))
    unused = [f"{names.layer.format(i)}.{name}" for i in range(config.num_layers) for name in names.layer_buffers]
    if config.tie_word_embeddings:
        unused.append(f"{names.lm_head}.weight")
    return DecoderWeights(tuple(matrices), tuple(vectors), frozenset(unused), names.base_model_prefix)


class _Table:
    def __init__(self, config: ModelConfig, names: WeightNames) -> None:
        self.config = config
        self.names = names

    def embedding(self, key: str, name: str) -> MatrixSlot:
        vocab_size = self.config.vocab_size
        return MatrixSlot(key, f"{name}.weight", vocab_size, self.config.embedding_size, 0, vocab_size, False)

    def norm(self, key: str, name: str, dim: int, bias: bool | None = None) -> Iterator[VectorSlot]:
        offset = self.config.norm_weight_offset
        yield VectorSlot(f"{key}.weight", f"{name}.weight", (dim,), 0, (dim,), offset)
        if self.config.norm == "layer_norm" if bias is None else bias:
            yield VectorSlot(f"{key}.bias", f"{name}.bias", (dim,), 0, (dim,))

    def layer_matrices(self, layer: int) -> Iterator[MatrixSlot]:
        for key, tensor, n, k, first_row, source_rows in self._linears(layer):
            yield MatrixSlot(key, f"{tensor}.weight", n, k, first_row, source_rows, self.names.transposed)

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
        biased = {
            "query": config.attention_bias,
            "key": config.attention_bias,
            "value": config.attention_bias,
            "attention_out": config.attention_out_bias,
        }
        for linear, tensor, n, _, first_row, source_rows in self._linears(layer):
            if biased.get(linear.rpartition(".")[2], config.mlp_bias):
                yield VectorSlot(f"{linear}.bias", f"{tensor}.bias", (n,), first_row, (source_rows,))

    def _linears(self, layer: int) -> Iterator[tuple[str, str, int, int, int, int]]:
        """Key, tensor, n, k, first row and rows of the tensor, of each linear layer."""
        config, names = self.config, self.names
        hidden, inner = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        mlp_in = ("gate", "up") if config.gated_mlp else ("up",)
        for keys, tensors, widths, k in (
            (("query", "key", "value"), names.qkv, (query, kv, kv), hidden),
            (("attention_out",), (names.attention_out,), (hidden,), query),
            (mlp_in, names.mlp_in, (inner,) * len(mlp_in), hidden),
            (("down",), (names.mlp_out,), (hidden,), inner),
        ):
            fused = len(tensors) == 1
            first_row = 0
            for i, (key, n) in enumerate(zip(keys, widths, strict=True)):
                tensor = f"{names.layer.format(layer)}.{tensors[0 if fused else i]}"
                source_rows = sum(widths) if fused else n
                yield f"layers.{layer}.{key}", tensor, n, k, first_row if fused else 0, source_rows
                first_row += n
