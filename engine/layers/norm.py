"""RMSNorm and LayerNorm, each also fused with the residual addition before it."""

from __future__ import annotations

from typing import Protocol

import torch

from engine.kernels.backend import KernelBackend
from engine.layers.weight import WeightTarget
from engine.model_config import ModelConfig


class Norm(Protocol):
    """Normalises the last dimension."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of x, a new tensor."""
        ...

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x into `residual` in place and return its norm. Both `[num_tokens, size]`."""
        ...

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]: ...


class RMSNorm:
    """Root-mean-square normalisation (arXiv 1910.07467).

    Args:
        weight_offset: `ModelConfig.norm_weight_offset`, added to the checkpoint's weight before that is rounded.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps
        self._kernels = kernels
        self._weight_offset = weight_offset

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": WeightTarget(tuple(self.weight.shape), self._load)}

    def _load(self, stored: torch.Tensor) -> None:
        self.weight.copy_(stored.float() + self._weight_offset if self._weight_offset else stored)


class LayerNorm:
    """Normalisation by mean and variance, with a bias (arXiv 1607.06450)."""

    def __init__(self, size: int, eps: float, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.bias = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self(residual.add_(x))

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            f"{prefix}.weight": WeightTarget.whole(self.weight),
            f"{prefix}.bias": WeightTarget.whole(self.bias),
        }


def build_norm(config: ModelConfig, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> Norm:
    """The norm of hidden states that `config` asks for."""
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, config.norm_eps, kernels, dtype, device)
    return RMSNorm(config.hidden_size, config.norm_eps, kernels, dtype, device, config.norm_weight_offset)
