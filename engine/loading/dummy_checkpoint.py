"""Random weights in the shape of a published model, or of any config.json: for tests and speed measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import ModelConfig, RopeScaling
from engine.errors import ModelLoadError
from engine.loading.checkpoint import Checkpoint
from engine.loading.hf_config import read_hf_config

if TYPE_CHECKING:
    import torch

    from engine.tokenization import Tokenizer

_SEED = 0
_POOL_SIZE = 1_000_003  # prime, so that no row length divides it and rows differ

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
        rms_norm_eps=1e-5,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def _qwen2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> ModelConfig:
    shape = _llama(hidden, intermediate, layers, heads, kv_heads, vocab, 32768, 1e6, tied=tied)
    return dataclasses.replace(shape, architecture="Qwen2ForCausalLM", rms_norm_eps=1e-6, attention_bias=True)


SHAPES = {
    "tiny": dataclasses.replace(_llama(64, 128, 2, 4, 2, 512, 512, 1e4, tied=True), dtype="float32"),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, 1e5, tied=True),
    "smollm2-360m": _llama(960, 2560, 32, 15, 5, 49152, 8192, 1e5, tied=True),
    "smollm2-1.7b": _llama(2048, 8192, 24, 32, 32, 49152, 8192, 1.3e5, tied=True),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256, 131072, 5e5, _LLAMA_3_1),
    "qwen2.5-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064, tied=False),
}


class DummyCheckpoint(Checkpoint):
    """Weights drawn from a fixed seed: the same in every process.

    Each tensor is a stretch of one pool of normal numbers, repeated, scaled to keep activations near 1: drawing
    billions of numbers would take minutes, and speed does not depend on their values.
    """

    def __init__(self, source: str, shape: str) -> None:
        super().__init__(source, name=f"dummy-{Path(shape).stem if shape not in SHAPES else shape}")
        self._path = None if shape in SHAPES else Path(shape).expanduser()
        if self._path is not None and self._path.is_dir():
            self._path /= "config.json"
        if self._path is None:
            config = SHAPES[shape]
        elif self._path.is_file():
            config = read_hf_config(self._path, fingerprint="")
        else:
            raise ModelLoadError(f"{source}: {shape} is neither a file nor one of {', '.join(sorted(SHAPES))}")
        digest = hashlib.sha256(f"dummy {_SEED} {config!r}".encode()).hexdigest()[:32]
        self._config = dataclasses.replace(config, fingerprint=digest)

    def model_config(self) -> ModelConfig:
        return self._config

    def tokenizer(self) -> Tokenizer | None:
        from engine.tokenization import tokenizer_from_hf_folder

        return None if self._path is None else tokenizer_from_hf_folder(self._path.parent)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        dtype = getattr(torch, self._config.dtype)
        pool = torch.randn(_POOL_SIZE, generator=torch.Generator().manual_seed(_SEED)).to(dtype)
        for name, shape in _weight_shapes(self._config):
            if name.endswith("norm.weight"):
                yield name, torch.ones(shape, dtype=dtype)
                continue
            num_elements = math.prod(shape)
            digest = hashlib.sha256(name.encode()).digest()
            start = int.from_bytes(digest[:8], "little") % _POOL_SIZE
            repeats = -(-(start + num_elements) // _POOL_SIZE)
            values = pool.repeat(repeats)[start : start + num_elements].view(shape)
            yield name, values.mul_(0.02 if len(shape) == 1 else shape[-1] ** -0.5)

    @property
    def num_weight_bytes(self) -> int:
        element = 4 if self._config.dtype == "float32" else 2
        return element * sum(math.prod(shape) for _, shape in _weight_shapes(self._config))

    @property
    def fingerprint(self) -> str:
        return self._config.fingerprint


def _weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight of the Llama family under its Hugging Face name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = [
        ("self_attn.q_proj", query, hidden, config.attention_bias),
        ("self_attn.k_proj", kv, hidden, config.attention_bias),
        ("self_attn.v_proj", kv, hidden, config.attention_bias),
        ("self_attn.o_proj", hidden, query, config.attention_out_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        for name, rows, columns, has_bias in linears:
            yield f"{layer}{name}.weight", (rows, columns)
            if has_bias:
                yield f"{layer}{name}.bias", (rows,)
        if config.qk_norm:
            yield f"{layer}self_attn.q_norm.weight", (config.head_dim,)
            yield f"{layer}self_attn.k_norm.weight", (config.head_dim,)
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
