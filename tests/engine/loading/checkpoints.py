"""Small checkpoints of every supported architecture, written by the libraries that others write theirs with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import gguf  # which a machine that is only visited need not have

FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., PreTrainedModel]]] = {
    "LlamaForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "MistralForCausalLM": (MistralConfig, MistralForCausalLM),
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3ForCausalLM),
    "Gemma3ForCausalLM": (Gemma3TextConfig, Gemma3ForCausalLM),
    "OPTForCausalLM": (OPTConfig, OPTForCausalLM),
    "GPT2LMHeadModel": (GPT2Config, GPT2LMHeadModel),
}
_TOKENS: dict[str, Any] = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
# Two local layers, a global one, a local one.
_GEMMA3_SHAPE: dict[str, Any] = _LLAMA_SHAPE | {
    "num_hidden_layers": 4,
    "head_dim": 32,
    "sliding_window": 7,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
}
_OPT_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
}
_GPT2_SHAPE: dict[str, Any] = {"n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 4, "n_positions": 128}

_SHAPES = {"Gemma3ForCausalLM": _GEMMA3_SHAPE, "OPTForCausalLM": _OPT_SHAPE, "GPT2LMHeadModel": _GPT2_SHAPE}


def hf_model(architecture: str, **overrides: Any) -> PreTrainedModel:
    """A tiny transformers model with random weights, norms and biases included."""
    shape = _SHAPES.get(architecture, _LLAMA_SHAPE)
    make_config, make_model = FAMILIES[architecture]
    torch.manual_seed(0)
    model = make_model(make_config(**(_TOKENS | shape | overrides)))
    model.train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3)  # logits well apart
    return model


def save_hf(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Save as safetensors and return the folder."""
    model.save_pretrained(folder, **options)
    return folder


def gguf_names(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Hugging Face weights under GGUF's names, by the gguf package's own table, changed as llama.cpp's conversion does:
    Llama's Q and K permuted, 1 added to Gemma's norms."""
    import gguf

    arch = config.architecture.removesuffix("ForCausalLM").upper()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_layers)
    out: dict[str, np.ndarray[Any, Any]] = {}
    for name, weight in weights.items():
        values = weight.detach().float().numpy()
        if arch == "LLAMA" and "q_proj" in name:
            values = _permute(values, config.num_heads)
        if arch == "LLAMA" and "k_proj" in name:
            values = _permute(values, config.num_kv_heads)
        if arch == "GEMMA3" and name.endswith("norm.weight"):
            values = values + np.float32(1)
        renamed = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, name
        out[renamed] = np.ascontiguousarray(values)
    return out


def _permute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's conversion does to Llama's Q and K: rows (half, i) of a head become (i, half)."""
    rows = np.arange(values.shape[0]).reshape(num_heads, 2, -1)
    permuted: np.ndarray[Any, Any] = values[rows.transpose(0, 2, 1).reshape(-1)]
    return permuted


def write_gguf(
    path: Path,
    architecture: str,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    quantise: Callable[[str, np.ndarray[Any, Any]], gguf.GGMLQuantizationType] | None = None,
    extend: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A GGUF file by gguf.GGUFWriter; `quantise` names each tensor's type, `extend` adds metadata."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    windows = {window for window in config.layer_windows if window is not None}
    if windows:
        writer.add_sliding_window(windows.pop())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if extend is not None:
        extend(writer)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.F32 if quantise is None else quantise(name, values)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
