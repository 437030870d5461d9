"""What a checkpoint says of itself: the shape of its decoder. Frozen, checked where it is made; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config_checks import check_integer, check_one_of
from engine.errors import ConfigError, UnsupportedModelError

PositionEmbedding = Literal["rotary", "learned"]
Norm = Literal["rms_norm", "layer_norm"]
NormPlacement = Literal["pre", "post", "sandwich"]

GATED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
PLAIN_ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh")  # the last two are one function


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `kind` is "linear" (all frequencies divided by `factor`), "llama3" (Llama 3.1's piecewise rule: long wavelengths
    divided by `factor`, short ones kept, a smooth ramp between) or "per_frequency" (the i-th frequency divided by
    `factors[i]`, head_dim / 2 of them: how GGUF files spell Llama 3.1's rule).
    """

    kind: Literal["linear", "llama3", "per_frequency"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, read from a checkpoint's config.json or GGUF metadata.

    The defaults are Llama's. OPT and GPT-2 differ in `norm`, `position_embedding`, `gated_mlp` and `hidden_act`;
    Gemma 3 in `layer_windows`, `rope_local_theta`, `embedding_scale`, `query_scale`, `norm_placement` and
    `hidden_act`.

    Attributes:
        architecture: the Hugging Face class name, e.g. "LlamaForCausalLM". It decides the names of the weights; all
            else that differs between architectures is in the fields below.
        rope_local_theta: rotary base of the layers that have a window, their frequencies never scaled; None: all layers
            share `rope_theta` and `rope_scaling` (Gemma 3's local layers differ).
        embedding_dim: width of a token's embedding; None is `hidden_size`, any other is projected to it and, before
            the head, back (OPT-350m).
        embedding_scale: factor on a token's embedding, rounded to the weights' type first (Gemma: √hidden_size); the
            head does not see it, even when tied.
        position_embedding: "rotary" turns q and k, "learned" adds a row of a table to the embedding.
        position_offset: rows of the learned table before position 0's (2 in OPT).
        norm: "rms_norm", or "layer_norm" with a bias.
        norm_placement: "pre" norms what goes into attention and MLP, "post" the sum of each with its input
            (OPT-350m), "sandwich" what goes in and what comes out, before it is added to its input (Gemma 3).
        norm_weight_offset: added to the weights of RMSNorm as they are loaded, q's and k's too: 1 in Gemma's
            safetensors, which hold w and mean 1 + w; 0 in its GGUF files, where the conversion has added it.
        final_norm: a norm after the last layer.
        gated_mlp: `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        hidden_act: the MLP's activation by Hugging Face's name: one of GATED_ACTIVATIONS if gated, else one of
            PLAIN_ACTIVATIONS.
        qk_norm: RMSNorm over each head of q and k before the rotary embedding (Qwen3, Gemma 3).
        query_scale: factor on the attention scores; None is `head_dim ** -0.5`. See `attention_scale`.
        attention_bias: biases on q, k and v (Qwen2); `attention_out_bias` on the output projection.
        sliding_window: tokens each query may look back on, or None for all (Mistral 7B v0.1).
        layer_windows: each layer's own sliding window or None, where layers differ (Gemma 3: five local layers, then
            one that sees all); empty: all have `sliding_window`. Read either by `window`.
        eos_token_ids: ids that end a generation unless `ignore_eos`.
        fingerprint: hex digest of the checkpoint's content identity; seeds prefix-cache hashes.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    embedding_dim: int | None = None
    embedding_scale: float = 1.0
    position_embedding: PositionEmbedding = "rotary"
    position_offset: int = 0
    norm: Norm = "rms_norm"
    norm_placement: NormPlacement = "pre"
    norm_weight_offset: float = 0.0
    final_norm: bool = True
    gated_mlp: bool = True
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scale: float | None = None
    sliding_window: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"model config: {name}={value!r} must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model config: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim={self.head_dim} must be even")
        self._check_variant()

    def _check_variant(self) -> None:
        """What differs between architectures: known values, and combinations that the decoder has."""
        check_one_of("model config: position_embedding", self.position_embedding, ("rotary", "learned"))
        check_one_of("model config: norm", self.norm, ("rms_norm", "layer_norm"))
        check_one_of("model config: norm_placement", self.norm_placement, ("pre", "post", "sandwich"))
        check_integer("model config: embedding_dim", self.embedding_dim, 1, 1 << 30, optional=True)
        check_integer("model config: position_offset", self.position_offset, 0, 1 << 30)
        if self.position_offset and self.position_embedding != "learned":
            raise ConfigError(
                f"model config: position_offset={self.position_offset} needs learned positions, not "
                f"{self.position_embedding}"
            )
        self._check_windows()
        if self.qk_norm and self.norm != "rms_norm":
            raise ConfigError(f"model config: qk_norm needs norm=rms_norm, not {self.norm}")
        if self.norm_weight_offset and self.norm != "rms_norm":
            raise ConfigError(
                f"model config: norm_weight_offset={self.norm_weight_offset} needs norm=rms_norm, not {self.norm}"
            )
        activations = GATED_ACTIVATIONS if self.gated_mlp else PLAIN_ACTIVATIONS
        if self.hidden_act not in activations:
            kind = "gated" if self.gated_mlp else "plain"
            raise UnsupportedModelError(f"activation {self.hidden_act!r} of a {kind} MLP", activations)

    def _check_windows(self) -> None:
        if self.layer_windows and len(self.layer_windows) != self.num_layers:
            raise ConfigError(
                f"model config: layer_windows has {len(self.layer_windows)} entries, num_layers={self.num_layers}"
            )
        if self.layer_windows and self.sliding_window is not None:
            raise ConfigError(
                f"model config: sliding_window={self.sliding_window} beside layer_windows, which say it of each layer"
            )
        for window in (self.sliding_window, *self.layer_windows):
            check_integer("model config: sliding_window", window, 1, 1 << 30, optional=True)

    def window(self, layer: int) -> int | None:
        """The sliding window of one layer, or None if it sees all tokens before it."""
        return self.layer_windows[layer] if self.layer_windows else self.sliding_window

    def is_local(self, layer: int) -> bool:
        """The layer rotates q and k by `rope_local_theta`, unscaled, and not by `rope_theta` and `rope_scaling`."""
        return self.rope_local_theta is not None and self.window(layer) is not None

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def embedding_size(self) -> int:
        """Width of a token's embedding and of what the head takes."""
        return self.embedding_dim or self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Weights of the decoder: matrices, biases, norms, and the embeddings, included once when tied."""
        hidden, inner = self.hidden_size, self.intermediate_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = hidden * (2 if self.norm == "layer_norm" else 1)

        attention = hidden * (query + 2 * kv) + query * hidden
        attention += (query + 2 * kv) * self.attention_bias + hidden * self.attention_out_bias
        attention += 2 * self.head_dim * self.qk_norm

        mlp_inputs = 2 if self.gated_mlp else 1
        mlp = (mlp_inputs + 1) * hidden * inner + (mlp_inputs * inner + hidden) * self.mlp_bias

        embeddings = self.vocab_size * self.embedding_size * (1 if self.tie_word_embeddings else 2)
        if self.embedding_size != hidden:
            embeddings += 2 * hidden * self.embedding_size
        if self.position_embedding == "learned":
            embeddings += (self.max_position_embeddings + self.position_offset) * hidden
        norms = norm * (4 if self.norm_placement == "sandwich" else 2)
        return embeddings + self.num_layers * (attention + mlp + norms) + norm * self.final_norm
