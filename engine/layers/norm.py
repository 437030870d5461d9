"""RMSNorm."""

from __future__ import annotations

import torch

from engine.kernels.backend import KernelBackend
from engine.layers.weight import WeightTarget


class RMSNorm:
    """Root-mean-square normalisation of the last dimension, fused with the residual addition before it."""

    def __init__(self, size: int, eps: float, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps
        self._kernels = kernels

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Add x into `residual` in place and return its norm."""
        return self._kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": WeightTarget.whole(self.weight)}
