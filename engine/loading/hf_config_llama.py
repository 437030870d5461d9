"""The Llama family's config.json: Llama, Mistral, Qwen2 and Qwen3."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.config_reader import CommonFields, ConfigReader
from engine.model_config import ModelConfig, RopeScaling


def llama_config(reader: ConfigReader, common: CommonFields) -> ModelConfig:
    architecture = common["architecture"]
    partial = reader.get("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(f"{reader.path}: partial_rotary_factor={partial}", ["1.0"])
    num_heads = reader.required("num_attention_heads", int)
    hidden_size = reader.required("hidden_size", int)
    head_dim = reader.optional("head_dim", int)
    if head_dim is None:
        # 128 is transformers' default for Qwen3, whatever the hidden size.
        head_dim = 128 if architecture == "Qwen3ForCausalLM" else reader.divided("hidden_size", hidden_size, num_heads)
    llama = architecture == "LlamaForCausalLM"
    sliding_window, windows = _windows(reader, architecture)
    rope = reader.child("rope_parameters") or reader.child("rope_scaling")
    bias = reader.get("attention_bias", bool, False) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return ModelConfig(
        **common,
        hidden_size=hidden_size,
        intermediate_size=reader.required("intermediate_size", int),
        num_layers=reader.required("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=reader.get("num_key_value_heads", int, num_heads)
        if llama
        else reader.required("num_key_value_heads", int),
        head_dim=head_dim,
        max_position_embeddings=reader.required("max_position_embeddings", int),
        norm_eps=reader.get("rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(reader),
        rope_scaling=None if rope is None else rope_scaling(reader, rope),
        hidden_act=reader.get("hidden_act", str, "silu"),
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, False),
        attention_bias=bias or architecture == "Qwen2ForCausalLM",
        attention_out_bias=bias,
        mlp_bias=llama and reader.get("mlp_bias", bool, False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=sliding_window,
        layer_windows=windows,
    )


def _rope_theta(reader: ConfigReader) -> float:
    parameters = reader.child("rope_parameters")
    if parameters is not None and "rope_theta" in parameters.fields:
        return parameters.required("rope_theta", float)
    return reader.get("rope_theta", float, 10000.0)


def rope_scaling(reader: ConfigReader, rope: ConfigReader) -> RopeScaling | None:
    """From `rope_scaling` (transformers 4) or `rope_parameters` (5), whose kind is `rope_type` or, older, `type`."""
    kind = rope.optional("rope_type", str) or rope.get("type", str, "default")
    partial = rope.get("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(f"{reader.path}: {rope.prefix}partial_rotary_factor={partial}", ["1.0"])
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_factor(rope))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=_factor(rope),
            low_freq_factor=rope.required("low_freq_factor", float),
            high_freq_factor=rope.required("high_freq_factor", float),
            original_max_position_embeddings=rope.get(
                "original_max_position_embeddings", int, reader.required("max_position_embeddings", int)
            ),
        )
    raise UnsupportedModelError(f"{reader.path}: rope type {kind!r}", ["default", "linear", "llama3"])


def _factor(rope: ConfigReader) -> float:
    factor = rope.required("factor", float)
    if not factor >= 1.0:
        raise ModelLoadError(f"{rope.path}: {rope.prefix}factor={factor} must be at least 1")
    return factor


def _windows(reader: ConfigReader, architecture: str) -> tuple[int | None, tuple[int | None, ...]]:
    """`sliding_window`, and `layer_windows` if layers differ."""
    if architecture == "LlamaForCausalLM":
        return None, ()
    if architecture == "MistralForCausalLM":
        # Absent means transformers' default, null means none.
        return reader.optional("sliding_window", int) if "sliding_window" in reader.fields else 4096, ()
    if not reader.get("use_sliding_window", bool, False):
        return None, ()
    window = reader.get("sliding_window", int, 4096)
    num_full = reader.get("max_window_layers", int, 28)
    windows = layer_windows(reader, window, [i >= num_full for i in range(reader.required("num_hidden_layers", int))])
    return (windows[0], ()) if len(set(windows)) == 1 else (None, windows)


def layer_windows(reader: ConfigReader, window: int, is_local: Sequence[bool]) -> tuple[int | None, ...]:
    """Each layer's window: as `layer_types` says it, or, where the file has none, `is_local`."""
    types = reader.fields.get("layer_types")
    if types is None:
        return tuple(window if local else None for local in is_local)
    windows: dict[str, int | None] = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != len(is_local):
        raise ModelLoadError(f"{reader.path}: layer_types={types!r} must be a list of {len(is_local)} kinds")
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in windows]
    if unknown:
        raise UnsupportedModelError(f"{reader.path}: layer type {unknown[0]!r}", windows)
    return tuple(windows[kind] for kind in types)
