"""ModelConfig from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from engine.loading.config_reader import CommonFields, ConfigReader, read_json
from engine.loading.hf_config_gemma import gemma3_config
from engine.loading.hf_config_gpt import gpt2_config, opt_config
from engine.loading.hf_config_llama import llama_config
from engine.model_config import ModelConfig

_READERS: dict[str, Callable[[ConfigReader, CommonFields], ModelConfig]] = {
    "LlamaForCausalLM": llama_config,
    "MistralForCausalLM": llama_config,
    "Qwen2ForCausalLM": llama_config,
    "Qwen3ForCausalLM": llama_config,
    "Gemma3ForCausalLM": gemma3_config,
    "OPTForCausalLM": opt_config,
    "GPT2LMHeadModel": gpt2_config,
}


def read_hf_config(path: Path, fingerprint: str) -> ModelConfig:
    """The ModelConfig of a config.json; `generation_config.json` beside it may add ids that end a generation.

    Raises:
        ModelLoadError: a field is missing or malformed.
        UnsupportedModelError: the model needs what no decoder here has.
    """
    fields = read_json(path)
    generation_path = path.with_name("generation_config.json")
    generation = read_json(generation_path) if path.name == "config.json" and generation_path.is_file() else {}
    reader = ConfigReader(path, fields)
    architecture = _architecture(reader)
    if reader.child("quantization_config") is not None:
        raise UnsupportedModelError(f"{path}: quantization_config", ["float32, bfloat16 and float16 weights"])
    common = CommonFields(
        architecture=architecture,
        vocab_size=reader.required("vocab_size", int),
        bos_token_id=next(iter(_token_ids(path, "bos_token_id", fields.get("bos_token_id"))), None),
        eos_token_ids=_eos_token_ids(reader, generation),
        dtype=_dtype(reader),
        fingerprint=fingerprint,
    )
    try:
        return _READERS[architecture](reader, common)
    except ConfigError as error:
        raise ModelLoadError(f"{path}: {error}") from error


def _architecture(reader: ConfigReader) -> str:
    names = reader.fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelLoadError(f"{reader.path}: architectures={names!r} must name one architecture")
    if names[0] not in _READERS:
        raise UnsupportedModelError(f"{reader.path}: architecture {names[0]}", _READERS)
    return names[0]


def _eos_token_ids(reader: ConfigReader, generation: Mapping[str, Any]) -> tuple[int, ...]:
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


def _dtype(reader: ConfigReader) -> str:
    dtype = reader.optional("dtype", str) or reader.get("torch_dtype", str, "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UnsupportedModelError(f"{reader.path}: dtype {dtype!r}", ["float32", "bfloat16", "float16"])
    return dtype
