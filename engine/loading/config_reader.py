"""Typed look-ups in a checkpoint's JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from engine.errors import ModelLoadError

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


class ConfigReader:
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

    def divided(self, name: str, size: int, num_heads: int) -> int:
        """The head dimension: a field that the heads share evenly."""
        if num_heads < 1 or size % num_heads:
            raise ModelLoadError(f"{self.path}: {self.prefix}{name}={size} is no multiple of {num_heads} heads")
        return size // num_heads

    def child(self, name: str) -> ConfigReader | None:
        value = self.fields.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise ModelLoadError(f"{self.path}: {self.prefix}{name}={value!r} is not an object")
        return ConfigReader(self.path, value, prefix=f"{self.prefix}{name}.")


class CommonFields(TypedDict):
    """What every architecture's config.json says in the same words: arguments of ModelConfig."""

    architecture: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    fingerprint: str
