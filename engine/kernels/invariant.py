"""The CUDA library's kernels where they are batch-invariant, and Triton's where the vendors' are not."""

from __future__ import annotations

import torch

from engine.kernels.backend import KernelBackend
from engine.kernels.cuda import CudaBackend


class InvariantCudaBackend(CudaBackend):
    """A row's results are bitwise the same alone, in any batch and in any chunk.

    Attention is the CUDA library's with splits of a fixed size; its other kernels compute row by row anyway. Products
    and LayerNorm, which are torch's in a CudaBackend and may take another kernel for another number of rows, are
    Triton's.

    Args:
        triton: a batch-invariant TritonBackend on the same device.

    Raises:
        KernelsUnavailableError: the CUDA library or a usable GPU is not there.
    """

    name = "cuda and triton, batch-invariant"

    def __init__(self, triton: KernelBackend) -> None:
        super().__init__(batch_invariant=True)
        self._triton = triton

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self._triton.linear(x, weight, bias)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return self._triton.layer_norm(x, weight, bias, eps)
