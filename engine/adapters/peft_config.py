"""adapter_config.json, as PEFT saves it beside an adapter's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError, UnsupportedModelError
from engine.loading.config_reader import read_json

# What changes more than `W + scale * B A` of linear layers, and what it would have to be for nothing to change.
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "target_parameters": ([], None),
    "alora_invocation_tokens": ([], None),
}
# Initialisations that also change the base's weights: the saved A and B are right beside those only.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftConfig:
    """What of it matters for inference.

    Attributes:
        base: the model that the adapter was trained on, as its author named it; for messages.
        targets, excluded: names that modules end with, or one regular expression for whole names.
        layers: numbers of the layers that have adapters; None is all.
        rank_pattern, alpha_pattern: regular expression of a module's name → its own rank or alpha.
        use_rslora: the scale is alpha / sqrt(rank) rather than alpha / rank.
    """

    path: Path
    base: str
    rank: int
    alpha: float
    use_rslora: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    layers: frozenset[int] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        rank, alpha = self.rank_of(module), float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def adapts(self, module: str, layer: int) -> bool:
        """Whether a linear layer of decoder layer `layer` has an A and a B. `module` is its name in the base."""
        if _matches(self.excluded, module) or not _matches(self.targets, module):
            return False
        return self.layers is None or layer in self.layers


def read_peft_config(path: Path) -> PeftConfig:
    """Raises ModelLoadError: unreadable, malformed, or an UnsupportedModelError for more than LoRA of linear layers."""
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{path}: peft_type {kind!r}", ("LORA",))
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise ModelLoadError(
                f"{path}: {key}={config[key]!r} is not supported: an adapter is A and B of linear layers, nothing more"
            )
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.startswith(_CHANGES_BASE):
        raise ModelLoadError(
            f"{path}: init_lora_weights={initialisation!r} changes the base's weights, which adapters share; convert "
            "the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    layers = config.get("layers_to_transform")
    return PeftConfig(
        path=path,
        base=str(config.get("base_model_name_or_path") or "an unnamed base"),
        rank=_positive_int(path, "r", config.get("r")),
        alpha=_number(path, "lora_alpha", config.get("lora_alpha")),
        use_rslora=_boolean(path, "use_rslora", config.get("use_rslora", False)),
        targets=_names(path, "target_modules", config.get("target_modules"), required=True),
        excluded=_names(path, "exclude_modules", config.get("exclude_modules")),
        layers=None if layers is None else _layers(path, layers),
        rank_pattern={
            key: _positive_int(path, f"rank_pattern[{key!r}]", value)
            for key, value in _patterns(path, "rank_pattern", config).items()
        },
        alpha_pattern={
            key: _number(path, f"alpha_pattern[{key!r}]", value)
            for key, value in _patterns(path, "alpha_pattern", config).items()
        },
    )


def _matches(names: tuple[str, ...] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _positive_int(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelLoadError(f"{path}: {key}={value!r} must be an integer from 1 on")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ModelLoadError(f"{path}: {key}={value!r} must be a number")
    return float(value)


def _boolean(path: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ModelLoadError(f"{path}: {key}={value!r} must be true or false")
    return value


def _names(path: Path, key: str, value: Any, required: bool = False) -> tuple[str, ...] | str:
    if not value and not required:
        return ()
    if isinstance(value, str) and value:
        return _pattern(path, key, value)
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return tuple(value)
    raise ModelLoadError(f"{path}: {key}={value!r} must be a list of module names, or a regular expression")


def _patterns(path: Path, key: str, config: dict[str, Any]) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: {key}={value!r} must map names of modules to numbers")
    return {_pattern(path, key, name): number for name, number in value.items()}


def _pattern(path: Path, key: str, value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ModelLoadError(f"{path}: {key}: {value!r} is no regular expression: {error}") from None
    return value


def _layers(path: Path, value: Any) -> frozenset[int]:
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ModelLoadError(f"{path}: layers_to_transform={value!r} must be numbers of layers")
    return frozenset(numbers)
