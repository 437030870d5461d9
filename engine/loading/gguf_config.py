"""ModelConfig and Hugging Face weight names from a GGUF file's metadata."""

from __future__ import annotations

import struct
from pathlib import Path

from engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from engine.loading.gguf_config_gemma import as_gemma3
from engine.loading.gguf_reader import GGUFFile
from engine.model_config import ModelConfig, RopeScaling

# Mistral models are written as "llama".
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"  # read into the configuration, not a weight of the model


def hf_weight_name(path: Path, architecture: str, name: str) -> str:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"; an unknown name is a ModelLoadError."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer_names = _GEMMA3_LAYER_NAMES if architecture == "Gemma3ForCausalLM" else _LAYER_NAMES
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in layer_names:
        return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"
    raise ModelLoadError(f"{path}: tensor {name} has no place in the supported architectures")


def read_gguf_config(file: GGUFFile, fingerprint: str) -> ModelConfig:
    """The model's shape. Raises ModelLoadError or UnsupportedModelError."""
    kind = file.required("general.architecture", str)
    if kind not in _ARCHITECTURES:
        raise UnsupportedModelError(f"{file.path}: architecture {kind!r}", _ARCHITECTURES)
    if file.get(f"{kind}.expert_count", int):
        raise UnsupportedModelError(f"{file.path}: a mixture of experts", ["dense models"])
    if (file.get("split.count", int) or 1) > 1:
        raise UnsupportedModelError(f"{file.path}: a model split over several files", ["one GGUF file a model"])
    try:
        config = _model_config(file, kind, fingerprint)
        return as_gemma3(file, config) if kind == "gemma3" else config
    except ConfigError as error:
        raise ModelLoadError(f"{file.path}: {error}") from error


def _model_config(file: GGUFFile, kind: str, fingerprint: str) -> ModelConfig:
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path}: tensor token_embd.weight is missing")
    embedding = file.tensors["token_embd.weight"]
    num_heads = file.required(f"{kind}.attention.head_count", int)
    num_kv_heads = file.get(f"{kind}.attention.head_count_kv", int)
    head_dim = _head_dim(file, kind, num_heads)
    return ModelConfig(
        architecture=_ARCHITECTURES[kind],
        vocab_size=embedding.shape[0],
        hidden_size=file.required(f"{kind}.embedding_length", int),
        intermediate_size=file.required(f"{kind}.feed_forward_length", int),
        num_layers=file.required(f"{kind}.block_count", int),
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=file.required(f"{kind}.context_length", int),
        norm_eps=file.required(f"{kind}.attention.layer_norm_rms_epsilon", float),
        rope_theta=file.get(f"{kind}.rope.freq_base", float) or 10000.0,
        rope_scaling=_rope_scaling(file, kind, head_dim),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=kind == "qwen3",
        sliding_window=file.get(f"{kind}.attention.sliding_window", int) or None,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id", int),
        eos_token_ids=_eos_token_ids(file),
        dtype={"BF16": "bfloat16", "F16": "float16"}.get(embedding.type.name, "float32"),
        fingerprint=fingerprint,
    )


def _head_dim(file: GGUFFile, kind: str, num_heads: int) -> int:
    hidden_size = file.required(f"{kind}.embedding_length", int)
    head_dim = file.get(f"{kind}.attention.key_length", int) or hidden_size // max(num_heads, 1)
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        other = file.get(key, int)
        if other is not None and other != head_dim:
            raise UnsupportedModelError(f"{file.path}: {key}={other}", [f"the head dimension, {head_dim}"])
    return head_dim


def _rope_scaling(file: GGUFFile, kind: str, head_dim: int) -> RopeScaling | None:
    if ROPE_FACTORS in file.tensors:
        tensor = file.tensors[ROPE_FACTORS]
        if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
            raise ModelLoadError(
                f"{file.path}: tensor {ROPE_FACTORS} is {tensor.type.name} {list(tensor.shape)}, "
                f"expected F32 [{head_dim // 2}]"
            )
        factors = struct.unpack_from(f"<{head_dim // 2}f", file.data, tensor.start)
        return RopeScaling(kind="per_frequency", factors=factors)
    scaling = file.get(f"{kind}.rope.scaling.type", str)
    factor = file.get(f"{kind}.rope.scaling.factor", float) or file.get(f"{kind}.rope.scale_linear", float) or 1.0
    if scaling not in (None, "none", "linear"):
        raise UnsupportedModelError(f"{file.path}: rope scaling {scaling!r}", ["none", "linear", ROPE_FACTORS])
    if scaling == "none" or factor == 1.0:
        return None
    return RopeScaling(kind="linear", factor=factor)


def _eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """The end of text, of the turn (eot) and of a tool call (eom), as far as the file names them."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.get(f"tokenizer.ggml.{key}", int) for key in keys]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
