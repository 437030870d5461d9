"""Models by the architecture that a checkpoint names."""

from __future__ import annotations

import torch

from engine.errors import UnsupportedModelError
from engine.kernels.backend import KernelBackend
from engine.layers import WeightFormat
from engine.loading.weight_names import WEIGHT_NAMES
from engine.model_config import ModelConfig
from engine.models.causal_lm import CausalLM
from engine.models.decoder import Decoder
from engine.parallel.rank import Rank

__all__ = ["CausalLM", "build_model"]


def build_model(
    config: ModelConfig,
    kernels: KernelBackend,
    dtype: torch.dtype,
    device: torch.device,
    rank: Rank | None = None,
    weight_format: WeightFormat | None = None,
) -> CausalLM:
    """The model that `config` describes, its weights not yet filled; or one rank's part of it, which computes with the
    others. Raises UnsupportedModelError."""
    if config.architecture not in WEIGHT_NAMES:
        raise UnsupportedModelError(f"architecture {config.architecture}", WEIGHT_NAMES)
    return Decoder(config, WEIGHT_NAMES[config.architecture], kernels, dtype, device, rank, weight_format)
