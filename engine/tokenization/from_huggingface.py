"""Tokenizers from Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from engine.errors import ModelLoadError
from engine.tokenization.gpt2_files import is_gpt2_folder, read_gpt2_files
from engine.tokenization.tokenizer import Tokenizer

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_SLOW_FILES = ("tokenizer.model", "vocab.json", "tekken.json")


def tokenizer_from_hf_folder(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder, or None if it has no tokenizer files.

    Raises:
        ModelLoadError: a file is malformed.
    """
    path = folder / "tokenizer.json"
    config = _read_json(folder / "tokenizer_config.json")
    roles = _read_json(folder / "special_tokens_map.json") | config
    special_tokens = {role: _content(roles[role]) for role in _ROLES if roles.get(role)}
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelLoadError(f"{path}: {error}") from error
    elif is_gpt2_folder(folder, config, _read_json(folder / "config.json")):
        backend = read_gpt2_files(folder, config, special_tokens, _read_json(folder / "added_tokens.json"))
    else:
        return _through_transformers(folder) if any((folder / name).is_file() for name in _SLOW_FILES) else None
    _apply_add_flags(backend, config, special_tokens, folder)
    return Tokenizer(backend, special_tokens, _chat_template(folder, config))


def add_special_tokens_around(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `encode` put these tokens around a text; None leaves one out."""
    single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*single, *(f"{part}:1" for part in ([bos] if bos else [])), "$B:1", *([f"{eos}:1"] if eos else [])]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token],
    )


def _apply_add_flags(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str], folder: Path
) -> None:
    """`add_bos_token` and `add_eos_token`, where the configuration has them, overrule tokenizer.json."""
    flags = {role: config.get(f"add_{role}") for role in ("bos_token", "eos_token")}
    if all(flag is None for flag in flags.values()):
        return
    for role, flag in flags.items():
        if flag and (role not in special_tokens or backend.token_to_id(special_tokens[role]) is None):
            raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: add_{role} is set without a known {role}")
    bos, eos = (special_tokens[role] if flag else None for role, flag in flags.items())
    add_special_tokens_around(backend, bos, eos)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    value = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if value is None or isinstance(value, str):
        return value
    try:
        return {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError) as error:
        raise ModelLoadError(f"{folder}: chat_template is neither a text nor a list of named ones") from error


def _through_transformers(folder: Path) -> Tokenizer:
    """Convert an older vocabulary file. Takes seconds, and imports transformers."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and its converters raise
        raise ModelLoadError(f"{folder}: transformers cannot read the tokenizer: {error}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelLoadError(f"{folder}: no tokenizer.json, and transformers cannot convert this tokenizer to one")
    special_tokens = {role: str(getattr(tokenizer, role)) for role in _ROLES if getattr(tokenizer, role, None)}
    return Tokenizer(backend, special_tokens, tokenizer.chat_template)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where the file is absent."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _content(token: object) -> str:
    """A special token is a text, or an object with its "content"."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
