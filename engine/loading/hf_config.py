"""ModelConfig from a Hugging Face config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from engine.config import ModelConfig, RopeScaling
from engine.errors import ConfigError, ModelLoadError, UnsupportedModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_T = TypeVar("_T", bool, int, float, str)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or ModelLoadError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_hf_config(path: Path, fingerprint: str) -> ModelConfig:
    """The ModelConfig of a config.json; `generation_config.json` beside it may add ids that end a generation."""
    fields = read_json(path)
    generation_path = path.with_name("generation_config.json")
    generation = read_json(generation_path) if path.name == "config.json" and generation_path.is_file() else {}
    reader = _Reader(path, fields)
    try:
        return _model_config(reader, generation, fingerprint)
    except ConfigError as error:
        raise ModelLoadError(f"{path}: {error}") from error


class _Reader:
    """Typed look-ups; `null` reads as absent, as in transformers."""

    def __init__(self, path: Path, fields: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.fields = fields
        self.prefix = prefix

    def get(self, name: str, kind: type[_T], default: _T) -> _T:
        value = self.optional(name, kind)
        return default if value is None else value

    def required(self, name: str, kind: type[_T]) -> _T:
        value = self.optional(name, kind)
        if value is None:
            raise ModelLoadError(f"{self.path}: {self.prefix}{name} is missing")
        return value

    def optional(self, name: str, kind: type[_T]) -> _T | None:
        value = self.fields.get(name)
        if value is None:
            return None
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelLoadError(f"{self.path}: {self.prefix}{name}={value!r} is not of type {kind.__name__}")
        return value

    def child(self, name: str) -> _Reader | None:
        value = self.fields.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise ModelLoadError(f"{self.path}: {self.prefix}{name}={value!r} is not an object")
        return _Reader(self.path, value, prefix=f"{self.prefix}{name}.")


def _model_config(reader: _Reader, generation: Mapping[str, Any], fingerprint: str) -> ModelConfig:
    architecture = _architecture(reader)
    if reader.child("quantization_config") is not None:
        raise UnsupportedModelError(f"{reader.path}: quantization_config", ["float32, bfloat16 and float16 weights"])
    partial = reader.get("partial_rotary_factor", float, 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(f"{reader.path}: partial_rotary_factor={partial}", ["1.0"])

    num_heads = reader.required("num_attention_heads", int)
    hidden_size = reader.required("hidden_size", int)
    head_dim = reader.optional("head_dim", int)
    if head_dim is None:
        if architecture == "Qwen3ForCausalLM":
            head_dim = 128  # transformers' default there, whatever the hidden size
        elif num_heads < 1 or hidden_size % num_heads:
            raise ModelLoadError(f"{reader.path}: hidden_size={hidden_size} is no multiple of {num_heads} heads")
        else:
            head_dim = hidden_size // num_heads
    llama = architecture == "LlamaForCausalLM"
    bias = reader.get("attention_bias", bool, False) and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    return ModelConfig(
        architecture=architecture,
        vocab_size=reader.required("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=reader.required("intermediate_size", int),
        num_layers=reader.required("num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=reader.get("num_key_value_heads", int, num_heads)
        if llama
        else reader.required("num_key_value_heads", int),
        head_dim=head_dim,
        max_position_embeddings=reader.required("max_position_embeddings", int),
        rms_norm_eps=reader.get("rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(reader),
        rope_scaling=_rope_scaling(reader),
        hidden_act=reader.get("hidden_act", str, "silu"),
        tie_word_embeddings=reader.get("tie_word_embeddings", bool, False),
        attention_bias=bias or architecture == "Qwen2ForCausalLM",
        attention_out_bias=bias,
        mlp_bias=llama and reader.get("mlp_bias", bool, False),
        qk_norm=architecture == "Qwen3ForCausalLM",
        sliding_window=_sliding_window(reader, architecture),
        bos_token_id=_first(_token_ids(reader.path, "bos_token_id", reader.fields.get("bos_token_id"))),
        eos_token_ids=_eos_token_ids(reader, generation),
        dtype=_dtype(reader),
        fingerprint=fingerprint,
    )


def _architecture(reader: _Reader) -> str:
    names = reader.fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelLoadError(f"{reader.path}: architectures={names!r} must name one architecture")
    if names[0] not in ARCHITECTURES:
        raise UnsupportedModelError(f"{reader.path}: architecture {names[0]}", ARCHITECTURES)
    return names[0]


def _rope_theta(reader: _Reader) -> float:
    parameters = reader.child("rope_parameters")
    if parameters is not None and "rope_theta" in parameters.fields:
        return parameters.required("rope_theta", float)
    return reader.get("rope_theta", float, 10000.0)


def _rope_scaling(reader: _Reader) -> RopeScaling | None:
    """`rope_scaling` (transformers 4) or `rope_parameters` (5), whose kind is `rope_type` or, older, `type`."""
    rope = reader.child("rope_parameters") or reader.child("rope_scaling")
    if rope is None:
        return None
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


def _factor(rope: _Reader) -> float:
    factor = rope.required("factor", float)
    if not factor >= 1.0:
        raise ModelLoadError(f"{rope.path}: {rope.prefix}factor={factor} must be at least 1")
    return factor


def _sliding_window(reader: _Reader, architecture: str) -> int | None:
    if architecture == "LlamaForCausalLM":
        return None
    if architecture == "MistralForCausalLM":
        # Absent means transformers' default, null means none.
        return reader.optional("sliding_window", int) if "sliding_window" in reader.fields else 4096
    if not reader.get("use_sliding_window", bool, False):
        return None
    window = reader.get("sliding_window", int, 4096)
    num_layers = reader.required("num_hidden_layers", int)
    num_full = min(reader.get("max_window_layers", int, 28), num_layers)
    layer_types = reader.fields.get("layer_types")
    if isinstance(layer_types, list):
        num_full = layer_types.count("full_attention")
    if num_full == num_layers:
        return None
    if num_full == 0:
        return window
    raise UnsupportedModelError(
        f"{reader.path}: a sliding window on {num_layers - num_full} of {num_layers} layers",
        ["a sliding window on all layers or on none"],
    )


def _eos_token_ids(reader: _Reader, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Both files' ids: chat models often name the turn's end only in generation_config.json."""
    path = reader.path.with_name("generation_config.json")
    ids = _token_ids(path, "eos_token_id", generation.get("eos_token_id"))
    ids += _token_ids(reader.path, "eos_token_id", reader.fields.get("eos_token_id"))
    return tuple(dict.fromkeys(ids))


def _token_ids(path: Path, name: str, value: object) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
        raise ModelLoadError(f"{path}: {name}={value!r} must be a token id or a list of them")
    return tuple(values)


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None


def _dtype(reader: _Reader) -> str:
    dtype = reader.optional("dtype", str) or reader.get("torch_dtype", str, "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(f"{reader.path}: dtype {dtype!r}", ["float32", "bfloat16", "float16"])
    return dtype
