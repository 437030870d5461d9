"""Rotary position embeddings (RoFormer, arXiv 2104.09864): the table of cosines and sines."""

from __future__ import annotations

import math

import torch

from engine.model_config import ModelConfig, RopeScaling


def build_cos_sin(config: ModelConfig, device: torch.device, local: bool = False) -> torch.Tensor:
    """float32 `[max_position_embeddings, head_dim]`: cosines of the `head_dim / 2` angles, then their sines.

    The order of operations is transformers', so that the values are equal and not only close.

    Args:
        local: the table of the layers that have `rope_local_theta`, which must be set.
    """
    if local:
        assert config.rope_local_theta is not None
        inverse_frequencies = _unscaled(config.head_dim, config.rope_local_theta)
    else:
        inverse_frequencies = _scaled(_unscaled(config.head_dim, config.rope_theta), config.rope_scaling)
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _unscaled(head_dim: int, theta: float) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling | None) -> torch.Tensor:
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "per_frequency":
        return frequencies / torch.tensor(scaling.factors, dtype=torch.float32)
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: frequencies that turn often within the trained context stay, those that turn less than
    `low_freq_factor` times are divided by `factor`, and between the two the division fades in."""
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    ramp = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelengths > context / low, frequencies / scaling.factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, ramp, scaled)
