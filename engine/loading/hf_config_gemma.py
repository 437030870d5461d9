"""The config.json of Gemma 3's text models."""

from __future__ import annotations

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.config_reader import CommonFields, ConfigReader
from engine.loading.hf_config_llama import layer_windows, rope_scaling
from engine.model_config import ModelConfig

_SLIDING_WINDOW_PATTERN = 6  # every sixth layer sees all


def gemma3_config(reader: ConfigReader, common: CommonFields) -> ModelConfig:
    """Absent fields have transformers' defaults where the published files leave them out."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = reader.optional(name, float)
        if value is not None:
            raise UnsupportedModelError(f"{reader.path}: {name}={value}", ["null"])
    if reader.get("use_bidirectional_attention", bool, False):
        raise UnsupportedModelError(f"{reader.path}: use_bidirectional_attention=True", ["False"])
    hidden_size = reader.required("hidden_size", int)
    num_heads = reader.required("num_attention_heads", int)
    bias = reader.get("attention_bias", bool, False)
    global_rope, local_theta = _ropes(reader)
    return ModelConfig(
        **common,
        hidden_size=hidden_size,
        intermediate_size=reader.required("intermediate_size", int),
        num_layers=reader.required("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=reader.required("num_key_value_heads", int),
        head_dim=reader.get("head_dim", int, 256),
        max_position_embeddings=reader.required("max_position_embeddings", int),
        norm_eps=reader.get("rms_norm_eps", float, 1e-6),
        rope_theta=reader.get("rope_theta", float, 1e6)
        if global_rope is None
        else global_rope.get("rope_theta", float, reader.get("rope_theta", float, 1e6)),
        rope_scaling=None if global_rope is None else rope_scaling(reader, global_rope),
        rope_local_theta=local_theta,
        embedding_scale=hidden_size**0.5,
        norm_placement="sandwich",
        norm_weight_offset=1.0,
        hidden_act=reader.get("hidden_activation", str, "gelu_pytorch_tanh"),
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, True),
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        query_scale=reader.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        layer_windows=_layer_windows(reader),
    )


def _ropes(reader: ConfigReader) -> tuple[ConfigReader | None, float]:
    """What describes the global layers' rotation, if anything does, and the local layers' base.

    `rope_parameters` (transformers 5) has an object for each kind of layer; before, `rope_scaling` was the global
    layers' and `rope_local_base_freq` the local ones'.
    """
    local_theta = reader.get("rope_local_base_freq", float, 1e4)
    parameters = reader.child("rope_parameters")
    if parameters is None:
        return reader.child("rope_scaling"), local_theta
    local = parameters.child("sliding_attention")
    if local is not None:
        kind = local.get("rope_type", str, "default")
        if kind != "default":
            raise UnsupportedModelError(f"{reader.path}: {local.prefix}rope_type={kind!r}", ["default"])
        local_theta = local.get("rope_theta", float, local_theta)
    return parameters.child("full_attention"), local_theta


def _layer_windows(reader: ConfigReader) -> tuple[int | None, ...]:
    window = reader.get("sliding_window", int, 4096)
    pattern = reader.get("sliding_window_pattern", int, _SLIDING_WINDOW_PATTERN)
    if pattern < 1:
        raise ModelLoadError(f"{reader.path}: sliding_window_pattern={pattern} must be at least 1")
    num_layers = reader.required("num_hidden_layers", int)
    return layer_windows(reader, window, [(i + 1) % pattern != 0 for i in range(num_layers)])
