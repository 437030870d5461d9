"""The kernels in Triton: for GPUs where csrc/cuda was not built, a second opinion on those, and batch invariance."""

from __future__ import annotations

from engine.kernels.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
