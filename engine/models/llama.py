"""The Llama family: Llama, Mistral, Qwen2 and Qwen3 as one decoder.

    input_ids → embedding → [ norm → attention → norm → gated MLP ] × num_layers → norm → head

Eager torch: the kernels behind `KernelBackend` do what torch would do in many small operations. The objects are plain
ones, as nn.Module's call machinery costs more than these layers do at batch 1.
"""

from __future__ import annotations

import torch

from engine.config import ModelConfig
from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.layers import Embedding, GateUpLinear, Linear, LMHead, QKVLinear, RMSNorm, WeightTarget, build_cos_sin


class LlamaAttention:
    """Grouped-query attention over the paged cache, rotary embeddings, optional norms on each head of q and k."""

    def __init__(
        self,
        config: ModelConfig,
        cos_sin: torch.Tensor,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.sliding_window = config.sliding_window
        self.qkv_proj = QKVLinear(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attention_bias,
            dtype,
            device,
        )
        self.o_proj = Linear(
            config.num_heads * config.head_dim, config.hidden_size, config.attention_out_bias, dtype, device
        )
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps, kernels, dtype, device) if config.qk_norm else None
            for _ in range(2)
        )
        self._head_counts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
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

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {**self.qkv_proj.weight_targets(prefix), **self.o_proj.weight_targets(f"{prefix}.o_proj")}
        if self.q_norm is not None and self.k_norm is not None:
            targets |= self.q_norm.weight_targets(f"{prefix}.q_norm")
            targets |= self.k_norm.weight_targets(f"{prefix}.k_norm")
        return targets


class LlamaMLP:
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self.gate_up_proj = GateUpLinear(config.hidden_size, config.intermediate_size, config.mlp_bias, dtype, device)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, dtype, device)
        self._kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._kernels.silu_and_mul(self.gate_up_proj(x)))

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **self.gate_up_proj.weight_targets(prefix),
            **self.down_proj.weight_targets(f"{prefix}.down_proj"),
        }


class LlamaDecoderLayer:
    """Attention and MLP, each before it normed and after it added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        cos_sin: torch.Tensor,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype, device)
        self.self_attn = LlamaAttention(config, cos_sin, kernels, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype, device)
        self.mlp = LlamaMLP(config, kernels, dtype, device)

    def forward(
        self,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """The layer's last product, which the next norm adds into `residual`; x is the previous layer's."""
        normed = self.input_layernorm(residual) if x is None else self.input_layernorm.add(x, residual)
        attended = self.self_attn.forward(normed, key_cache, value_cache, metadata)
        return self.mlp.forward(self.post_attention_layernorm.add(attended, residual))

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **self.input_layernorm.weight_targets(f"{prefix}.input_layernorm"),
            **self.self_attn.weight_targets(f"{prefix}.self_attn"),
            **self.post_attention_layernorm.weight_targets(f"{prefix}.post_attention_layernorm"),
            **self.mlp.weight_targets(f"{prefix}.mlp"),
        }


class LlamaForCausalLM:
    """The whole decoder; see `CausalLM` for shapes."""

    def __init__(self, config: ModelConfig, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.unused_weights = frozenset({"lm_head.weight"} if config.tie_word_embeddings else ())
        self.cos_sin = build_cos_sin(config, device)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype, device)
        self.layers = [
            LlamaDecoderLayer(config, self.cos_sin, kernels, dtype, device) for _ in range(config.num_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels, dtype, device)
        tied_to = self.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype, device, tied_to)
        self._kv_pool: torch.Tensor | None = None
        self._caches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, input_ids: torch.Tensor, kv_pool: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        caches = self._layer_caches(kv_pool)
        residual = self.embed_tokens(input_ids)
        x: torch.Tensor | None = None
        for layer, (key_cache, value_cache) in zip(self.layers, caches, strict=True):
            x = layer.forward(x, residual, key_cache, value_cache, metadata)
        assert x is not None  # ModelConfig has at least one layer
        return self.norm.add(x, residual)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def weight_targets(self) -> dict[str, WeightTarget]:
        targets = self.embed_tokens.weight_targets("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            targets |= layer.weight_targets(f"model.layers.{i}")
        targets |= self.norm.weight_targets("model.norm")
        targets |= self.lm_head.weight_targets("lm_head")
        return targets

    def _layer_caches(self, kv_pool: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each layer as views `[num_blocks, num_kv_heads, block_size, head_dim]`, made once a pool."""
        if self._kv_pool is not kv_pool:
            self._kv_pool = kv_pool
            self._caches = [(layer[:, 0], layer[:, 1]) for layer in kv_pool.unbind(1)]
        return self._caches
