"""The decoder behind every architecture: Llama, Mistral, Qwen, Gemma 3, OPT and GPT-2 differ in their ModelConfig only.

    input_ids → embedding → [ norm → attention → norm → MLP ] × num_layers → norm → head

OPT-350m norms the sums after attention and MLP instead ("post"), Gemma 3 what comes out of either, too ("sandwich").

Eager torch: the kernels behind `KernelBackend` do what torch would do in many small operations. The objects are plain
ones, as nn.Module's call machinery costs more than these layers do at batch 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.layers import (
    Linear,
    PositionEmbedding,
    RMSNorm,
    WeightFormat,
    WeightTarget,
    build_activation,
    build_cos_sin,
    build_norm,
)
from engine.loading.weight_names import WeightNames
from engine.model_config import ModelConfig
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.linear import ColumnParallelLinear, Projection, RowParallelLinear
from engine.parallel.rank import Rank


class Attention:
    """Grouped-query attention over the paged cache, optional norms on each head of q and k, rotary embeddings or none.

    Args:
        cos_sin: the layer's rotary table, or None for a model that adds its positions to the embedding.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        cos_sin: torch.Tensor | None,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        rank: Rank,
        weight_format: WeightFormat | None,
    ) -> None:
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.sliding_window = config.window(layer)
        query, kv = (
            Projection(count * config.head_dim, range(own.start * config.head_dim, own.stop * config.head_dim))
            for count, own in (
                (config.num_heads, rank.shard.query_heads),
                (config.num_kv_heads, rank.shard.kv_heads),
            )
        )
        self._head_counts = [len(part.own) // config.head_dim for part in (query, kv, kv)]
        hidden = config.hidden_size
        self.qkv_proj = ColumnParallelLinear(
            hidden, [query, kv, kv], config.attention_bias, kernels, dtype, device, weight_format
        )
        self.o_proj = RowParallelLinear(
            *query, hidden, config.attention_out_bias, kernels, dtype, device, rank.communicator, weight_format
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, config.norm_eps, kernels, dtype, device, config.norm_weight_offset)
                for _ in range(2)
            )
        self._cos_sin = cos_sin
        self._kernels = kernels

    def forward(
        self, x: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        num_tokens = x.shape[0]
        heads = self.qkv_proj(x).view(num_tokens, -1, self.head_dim)
        query, key, value = torch.split(heads, self._head_counts, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query.contiguous()), self.k_norm(key.contiguous())
        self._kernels.rotate_and_cache(query, key, value, self._cos_sin, key_cache, value_cache, metadata)
        out = self._kernels.paged_attention(query, key_cache, value_cache, metadata, self.scale, self.sliding_window)
        return self.o_proj(out.view(num_tokens, -1))

    def weight_targets(self, names: WeightNames, layer: str) -> dict[str, WeightTarget]:
        targets = self.qkv_proj.weight_targets(*(f"{layer}.{name}" for name in names.qkv), transposed=names.transposed)
        targets |= self.o_proj.weight_targets(f"{layer}.{names.attention_out}", transposed=names.transposed)
        if self.q_norm is not None and self.k_norm is not None:
            targets |= self.q_norm.weight_targets(f"{layer}.{names.q_norm}")
            targets |= self.k_norm.weight_targets(f"{layer}.{names.k_norm}")
        return targets


class MLP:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))`."""

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        rank: Rank,
        weight_format: WeightFormat | None,
    ) -> None:
        hidden, inner = config.hidden_size, Projection(config.intermediate_size, rank.shard.mlp)
        projections = [inner, inner] if config.gated_mlp else [inner]
        self.in_proj = ColumnParallelLinear(hidden, projections, config.mlp_bias, kernels, dtype, device, weight_format)
        self.out_proj = RowParallelLinear(
            *inner, hidden, config.mlp_bias, kernels, dtype, device, rank.communicator, weight_format
        )
        self._activation = build_activation(config, kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self._activation(self.in_proj(x)))

    def weight_targets(self, names: WeightNames, layer: str) -> dict[str, WeightTarget]:
        return {
            **self.in_proj.weight_targets(*(f"{layer}.{name}" for name in names.mlp_in), transposed=names.transposed),
            **self.out_proj.weight_targets(f"{layer}.{names.mlp_out}", transposed=names.transposed),
        }


class DecoderLayer:
    """Attention and MLP around the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        cos_sin: torch.Tensor | None,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        rank: Rank,
        weight_format: WeightFormat | None,
    ) -> None:
        self.attention_norm = build_norm(config, kernels, dtype, device)
        self.self_attn = Attention(config, layer, cos_sin, kernels, dtype, device, rank, weight_format)
        self.mlp_norm = build_norm(config, kernels, dtype, device)
        self.mlp = MLP(config, kernels, dtype, device, rank, weight_format)
        self.attention_out_norm, self.mlp_out_norm = (
            build_norm(config, kernels, dtype, device) if config.norm_placement == "sandwich" else None
            for _ in range(2)
        )
        self._post_norm = config.norm_placement == "post"

    def forward(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The stream as (x, residual): x is a product that the next norm is still to add into `residual`, or None."""
        if self._post_norm:
            residual = self.attention_norm.add(
                self.self_attn.forward(residual, key_cache, value_cache, metadata), residual
            )
            return None, self.mlp_norm.add(self.mlp.forward(residual), residual)
        normed = self.attention_norm(residual) if x is None else self.attention_norm.add(x, residual)
        attended = self.self_attn.forward(normed, key_cache, value_cache, metadata)
        if self.attention_out_norm is None or self.mlp_out_norm is None:
            return self.mlp.forward(self.mlp_norm.add(attended, residual)), residual
        attended = self.attention_out_norm(attended)
        return self.mlp_out_norm(self.mlp.forward(self.mlp_norm.add(attended, residual))), residual

    def weight_targets(self, names: WeightNames, layer: str) -> dict[str, WeightTarget]:
        targets = {
            **self.attention_norm.weight_targets(f"{layer}.{names.attention_norm}"),
            **self.self_attn.weight_targets(names, layer),
            **self.mlp_norm.weight_targets(f"{layer}.{names.mlp_norm}"),
            **self.mlp.weight_targets(names, layer),
        }
        if self.attention_out_norm is not None and self.mlp_out_norm is not None:
            targets |= self.attention_out_norm.weight_targets(f"{layer}.{names.attention_out_norm}")
            targets |= self.mlp_out_norm.weight_targets(f"{layer}.{names.mlp_out_norm}")
        return targets


class Decoder:
    """The whole model, or one rank's part of it; see `CausalLM` for shapes.

    Args:
        weight_format: of the matrices of attention and MLP; embeddings and head are in `dtype`.
    """

    def __init__(
        self,
        config: ModelConfig,
        names: WeightNames,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        rank: Rank | None = None,
        weight_format: WeightFormat | None = None,
    ) -> None:
        rank = rank or Rank.alone(config)
        self.config = config
        self.base_model_prefix = names.base_model_prefix
        self._names = names
        hidden, embedding = config.hidden_size, config.embedding_size
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, embedding, dtype, device, rank)
        self.project_in: Linear | None = None
        self.project_out: Linear | None = None
        if embedding != hidden:
            self.project_in = Linear(embedding, [hidden], False, kernels, dtype, device)
            self.project_out = Linear(hidden, [embedding], False, kernels, dtype, device)
        # As transformers does: the factor itself is rounded.
        self._embedding_scale = torch.tensor(config.embedding_scale, dtype=dtype).item()
        cos_sin: torch.Tensor | None = None
        local_cos_sin: torch.Tensor | None = None
        self.embed_positions: PositionEmbedding | None = None
        if config.position_embedding == "rotary":
            cos_sin = build_cos_sin(config, device)
            if config.rope_local_theta is not None:
                local_cos_sin = build_cos_sin(config, device, local=True)
        else:
            self.embed_positions = PositionEmbedding(
                config.max_position_embeddings, config.position_offset, hidden, dtype, device
            )
        self.layers = [
            DecoderLayer(
                config,
                i,
                local_cos_sin if config.is_local(i) else cos_sin,
                kernels,
                dtype,
                device,
                rank,
                weight_format,
            )
            for i in range(config.num_layers)
        ]
        self.norm = build_norm(config, kernels, dtype, device) if config.final_norm else None
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(config.vocab_size, embedding, kernels, dtype, device, rank, tied_to)
        self._kv_pool: torch.Tensor | None = None
        self._caches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, input_ids: torch.Tensor, kv_pool: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        caches = self._layer_caches(kv_pool)
        x, residual = None, self._embed(input_ids, metadata.positions)
        for layer, (key_cache, value_cache) in zip(self.layers, caches, strict=True):
            x, residual = layer.forward(x, residual, key_cache, value_cache, metadata)
        if self.norm is None:
            return residual if x is None else residual.add_(x)
        return self.norm(residual) if x is None else self.norm.add(x, residual)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden if self.project_out is None else self.project_out(hidden))

    @property
    def unused_weights(self) -> frozenset[str]:
        names = [
            f"{self._names.layer.format(i)}.{name}"
            for i in range(len(self.layers))
            for name in self._names.layer_buffers
        ]
        if self.config.tie_word_embeddings:
            names.append(f"{self._names.lm_head}.weight")
        return frozenset(names)

    def weight_targets(self) -> dict[str, WeightTarget]:
        names = self._names
        targets = self.embed_tokens.weight_targets(names.embed_tokens)
        if self.embed_positions is not None:
            targets |= self.embed_positions.weight_targets(names.embed_positions)
        if self.project_in is not None and self.project_out is not None:
            targets |= self.project_in.weight_targets(names.project_in)
            targets |= self.project_out.weight_targets(names.project_out)
        for i, layer in enumerate(self.layers):
            targets |= layer.weight_targets(names, names.layer.format(i))
        if self.norm is not None:
            targets |= self.norm.weight_targets(names.final_norm)
        targets |= self.lm_head.weight_targets(names.lm_head)
        return targets

    def adaptable_linears(self) -> Iterator[tuple[tuple[str, ...], Linear]]:
        mlp_in = ("gate", "up") if self.config.gated_mlp else ("up",)
        for i, layer in enumerate(self.layers):
            for names, linear in (
                (("query", "key", "value"), layer.self_attn.qkv_proj),
                (("attention_out",), layer.self_attn.o_proj),
                (mlp_in, layer.mlp.in_proj),
                (("down",), layer.mlp.out_proj),
            ):
                yield tuple(f"layers.{i}.{name}" for name in names), linear

    def _embed(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        if self._embedding_scale != 1.0:
            x.mul_(self._embedding_scale)
        if self.project_in is not None:
            x = self.project_in(x)
        return x if self.embed_positions is None else x.add_(self.embed_positions(positions))

    def _layer_caches(self, kv_pool: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each layer as views `[num_blocks, num_kv_heads, block_size, head_dim]`, made once a pool."""
        if self._kv_pool is not kv_pool:
            self._kv_pool = kv_pool
            self._caches = [(layer[:, 0], layer[:, 1]) for layer in kv_pool.unbind(1)]
        return self._caches
