"""Shapes of published models, by the names that `dummy:` takes."""

from __future__ import annotations

import dataclasses

from engine.model_config import ModelConfig, RopeScaling

_LLAMA_3_1 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0)


def _llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int, theta: float,
    scaling: RopeScaling | None = None, tied: bool = False,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def _llama_1(hidden: int, intermediate: int, layers: int, heads: int) -> ModelConfig:
    shape = _llama(hidden, intermediate, layers, heads, heads, 32000, 2048, 1e4)
    return dataclasses.replace(shape, norm_eps=1e-6, dtype="float16")


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> ModelConfig:
    shape = _llama(hidden, intermediate, layers, heads, kv_heads, vocab, 32768, 1e6, tied=tied)
    return dataclasses.replace(shape, architecture="Qwen2ForCausalLM", norm_eps=1e-6, attention_bias=True)


def _gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, positions: int,
    head_dim: int = 256, window: int = 512,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        architecture="Gemma3ForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=positions,
        norm_eps=1e-6,
        rope_theta=1e6,
        rope_local_theta=1e4,
        embedding_scale=hidden**0.5,
        norm_placement="sandwich",
        norm_weight_offset=1.0,
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        qk_norm=True,
        query_scale=head_dim**-0.5,
        layer_windows=tuple(window if (i + 1) % 6 else None for i in range(layers)),
        bos_token_id=2,
        eos_token_ids=(1,),
        dtype="bfloat16",
    )


def _gpt2(hidden: int, layers: int, heads: int, vocab: int = 50257, positions: int = 1024) -> ModelConfig:
    return ModelConfig(
        architecture="GPT2LMHeadModel",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_position_embeddings=positions,
        norm_eps=1e-5,
        position_embedding="learned",
        norm="layer_norm",
        gated_mlp=False,
        hidden_act="gelu_new",
        tie_word_embeddings=True,
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        bos_token_id=vocab - 1,
        eos_token_ids=(vocab - 1,),
        dtype="float32",
    )


def _opt(hidden: int, layers: int, heads: int, vocab: int = 50272, positions: int = 2048) -> ModelConfig:
    return dataclasses.replace(
        _gpt2(hidden, layers, heads, vocab, positions),
        architecture="OPTForCausalLM",
        position_offset=2,
        hidden_act="relu",
        bos_token_id=2,
        eos_token_ids=(2,),
        dtype="float16",
    )


SHAPES = {
    "tiny": dataclasses.replace(_llama(64, 128, 2, 4, 2, 512, 512, 1e4, tied=True), dtype="float32"),
    "tiny-gemma3": dataclasses.replace(
        _gemma3(64, 128, 7, 4, 2, vocab=512, positions=512, head_dim=16, window=16), dtype="float32"
    ),
    "tiny-gpt2": _gpt2(64, 2, 4, vocab=512, positions=512),
    "tiny-opt": dataclasses.replace(_opt(64, 2, 4, vocab=512, positions=512), dtype="float32"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, 1e5, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, 8192, 1e5, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, 1.3e5, tied=True),
    "llama-7b": _llama_1(4096, 11008, 32, 32),
    "llama-13b": _llama_1(5120, 13824, 40, 40),
    "llama-30b": _llama_1(6656, 17920, 60, 52),
    "llama-65b": _llama_1(8192, 22016, 80, 64),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096, 1e4),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192, 5e5),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, 131072, 5e5, _LLAMA_3_1),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 262144, 32768),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 262144, 32768),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": dataclasses.replace(_opt(1024, 24, 16), embedding_dim=512, norm_placement="post", final_norm=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
}
