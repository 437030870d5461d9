"""What an engine is told (EngineConfig) and what a checkpoint says of itself (ModelConfig).

Both are frozen and checked where they are made. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import ConfigError, UnsupportedModelError

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none"]
Preemption = Literal["auto", "swap", "recompute"]
Device = Literal["auto", "cpu", "cuda"]
Reservation = Literal["paged", "orca_max", "orca_pow2", "orca_oracle"]
Batching = Literal["continuous", "static"]
PositionEmbedding = Literal["rotary", "learned"]
Norm = Literal["rms_norm", "layer_norm"]
NormPlacement = Literal["pre", "post"]

DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
GATED_ACTIVATIONS = ("silu",)
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

    The defaults are Llama's; OPT and GPT-2 differ in `norm`, `position_embedding`, `gated_mlp` and `hidden_act`.

    Attributes:
        architecture: the Hugging Face class name, e.g. "LlamaForCausalLM". It decides the names of the weights; all
            else that differs between architectures is in the fields below.
        embedding_dim: width of a token's embedding; None is `hidden_size`, any other is projected to it and, before
            the head, back (OPT-350m).
        position_embedding: "rotary" turns q and k, "learned" adds a row of a table to the embedding.
        position_offset: rows of the learned table before position 0's (2 in OPT).
        norm: "rms_norm", or "layer_norm" with a bias.
        norm_placement: "pre" norms what goes into attention and MLP, "post" the sum of each with its input
            (OPT-350m).
        final_norm: a norm after the last layer.
        gated_mlp: `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
        hidden_act: the MLP's activation by Hugging Face's name: "silu" if gated, else one of PLAIN_ACTIVATIONS.
        qk_norm: RMSNorm over each head of q and k before the rotary embedding (Qwen3).
        attention_bias: biases on q, k and v (Qwen2); `attention_out_bias` on the output projection.
        sliding_window: tokens each query may look back on, or None for all (Mistral 7B v0.1).
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
    embedding_dim: int | None = None
    position_embedding: PositionEmbedding = "rotary"
    position_offset: int = 0
    norm: Norm = "rms_norm"
    norm_placement: NormPlacement = "pre"
    final_norm: bool = True
    gated_mlp: bool = True
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
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
        _one_of("model config: position_embedding", self.position_embedding, ("rotary", "learned"))
        _one_of("model config: norm", self.norm, ("rms_norm", "layer_norm"))
        _one_of("model config: norm_placement", self.norm_placement, ("pre", "post"))
        _integer("model config: embedding_dim", self.embedding_dim, 1, 1 << 30, optional=True)
        _integer("model config: position_offset", self.position_offset, 0, 1 << 30)
        if self.position_offset and self.position_embedding != "learned":
            raise ConfigError(
                f"model config: position_offset={self.position_offset} needs learned positions, not "
                f"{self.position_embedding}"
            )
        if self.qk_norm and self.norm != "rms_norm":
            raise ConfigError(f"model config: qk_norm needs norm=rms_norm, not {self.norm}")
        activations = GATED_ACTIVATIONS if self.gated_mlp else PLAIN_ACTIVATIONS
        if self.hidden_act not in activations:
            kind = "gated" if self.gated_mlp else "plain"
            raise UnsupportedModelError(f"activation {self.hidden_act!r} of a {kind} MLP", activations)

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
        return embeddings + self.num_layers * (attention + mlp + 2 * norm) + norm * self.final_norm


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine. Unknown keys are refused by `from_dict`.

    Attributes:
        dtype: type of weights and activations; "auto" takes bfloat16 where the hardware multiplies it natively,
            float32 elsewhere.
        quantization: "none" runs dequantised weights in `dtype`; "auto" is "none" for now.
        kv_cache_dtype: type of the KV cache; "auto" is `dtype`.
        block_size: tokens in a KV block, a power of two from 1 to 256.
        num_blocks: KV blocks in the pool; None sizes the pool from `gpu_memory_utilization`.
        gpu_memory_utilization: fraction of the device's memory that weights and KV pool may fill together; on a CPU,
            the fraction of the memory available after loading that the KV pool may fill. None is 0.9 on a GPU and
            0.25 on a CPU.
        max_model_len: longest sequence in tokens, prompt and output; None takes the checkpoint's.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step, shared by decodes and prompt chunks.
        num_threads: threads of the CPU kernels and of torch; None takes all cores this process may use but one. Matrix
            products wait for their slowest thread, so a core shared with other work slows a step many times over.
        enable_prefix_caching: reuse KV blocks of equal prefixes. None is yes, except under a reservation other than
            "paged", where nothing can be shared.
        num_swap_blocks: blocks of host memory that preempted groups are swapped out to; 0 for no swapping. None is a
            quarter of the pool.
        preemption: what happens to the newest group when blocks run out: "swap" to host memory, "recompute" later, or
            "auto" for the cheaper of the two. A full swap pool falls back to recomputation.
        reservation: "paged" gives blocks on demand. The others are the paper's baselines: every sequence reserves one
            contiguous run at admission, for as many tokens as `max_model_len` ("orca_max"), its prompt and the next
            power of two of its output ("orca_pow2"), or its prompt and output ("orca_oracle"), where the output's
            length is taken to be `max_tokens`.
        batching: "continuous" admits requests at every step; "static" admits a batch together, as many as seats and
            memory allow, and the next one when all of it has ended.
        shared_prefixes: name → a text, or token ids, that many prompts begin with, such as a system prompt: its full
            blocks are computed at the start and pinned. Requests share them by their content; nothing names them.
        kernels: "auto", or the name of a kernel backend ("reference", "cpu", "cuda") for tests and comparisons.
        seed: base seed of requests that bring none.
    """

    dtype: DType = "auto"
    quantization: Quantization = "auto"
    kv_cache_dtype: DType = "auto"
    device: Device = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float | None = None
    num_swap_blocks: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    num_threads: int | None = None
    enable_prefix_caching: bool | None = None
    preemption: Preemption = "auto"
    reservation: Reservation = "paged"
    batching: Batching = "continuous"
    shared_prefixes: Mapping[str, str | Sequence[int]] = field(default_factory=dict)
    kernels: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, DTYPES)
        _one_of("quantization", self.quantization, ("auto", "none"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("preemption", self.preemption, ("auto", "swap", "recompute"))
        _one_of("reservation", self.reservation, ("paged", "orca_max", "orca_pow2", "orca_oracle"))
        _one_of("batching", self.batching, ("continuous", "static"))
        _one_of("kernels", self.kernels, ("auto", "reference", "cpu", "cuda"))
        _integer("block_size", self.block_size, 1, 256)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size} must be a power of two from 1 to 256")
        _integer("num_blocks", self.num_blocks, 1, 1 << 30, optional=True)
        _integer("num_swap_blocks", self.num_swap_blocks, 0, 1 << 30, optional=True)
        if self.preemption == "swap" and self.num_swap_blocks == 0:
            raise ConfigError("preemption='swap' needs num_swap_blocks above 0")
        _integer("max_model_len", self.max_model_len, 2, 1 << 30, optional=True)
        _integer("max_num_seqs", self.max_num_seqs, 1, 1 << 16)
        _integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24)
        _integer("num_threads", self.num_threads, 1, 1024, optional=True)
        _integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.enable_prefix_caching is not None and not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(f"enable_prefix_caching={self.enable_prefix_caching!r} must be true or false")
        fraction = self.gpu_memory_utilization
        if fraction is not None and not (isinstance(fraction, (int, float)) and 0.0 < fraction <= 1.0):
            raise ConfigError(f"gpu_memory_utilization={fraction!r} must be above 0 and at most 1")
        if not isinstance(self.shared_prefixes, Mapping):
            raise ConfigError("shared_prefixes must map names to texts or lists of token ids")
        if self.shared_prefixes and not self.prefix_caching:
            raise ConfigError("shared_prefixes need enable_prefix_caching=true and reservation=paged")
        if self.reservation != "paged":
            self._check_reservation()

    def _check_reservation(self) -> None:
        """What reserved runs rule out: sharing, and so prefix caching; and running short, and so preemption."""
        if self.enable_prefix_caching:
            raise ConfigError(
                f"enable_prefix_caching=True needs reservation=paged: sequences of reservation={self.reservation} "
                "share no blocks"
            )
        if self.num_swap_blocks:
            raise ConfigError(
                f"num_swap_blocks={self.num_swap_blocks} needs reservation=paged: nothing is preempted under "
                f"reservation={self.reservation}"
            )
        if self.preemption != "auto":
            raise ConfigError(
                f"preemption={self.preemption} needs reservation=paged: under reservation={self.reservation} every "
                "admitted sequence has all its memory, and none is preempted"
            )

    @property
    def prefix_caching(self) -> bool:
        """`enable_prefix_caching`, resolved."""
        return self.reservation == "paged" if self.enable_prefix_caching is None else self.enable_prefix_caching

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> EngineConfig:
        """Build from plain options; an unknown key is a ConfigError that lists the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"unknown engine option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**options)


@dataclass(frozen=True)
class CacheConfig:
    """The KV pool as it was built: measured values that EngineConfig leaves open."""

    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    num_swap_blocks: int = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def _integer(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an integer from {low} to {high}")
