"""The GPU that a backend's kernels belong to."""

from __future__ import annotations

import torch

from engine.kernels.library import KernelsUnavailableError

OLDEST_CAPABILITY = (8, 0)  # the first with asynchronous copies to shared memory


def find_gpu(kernels: str) -> torch.device:
    """torch's current CUDA device. Raises KernelsUnavailableError, which names the kernels."""
    if not torch.cuda.is_available():
        raise KernelsUnavailableError(f"the {kernels} kernels are not available: torch sees no CUDA device")
    index = torch.cuda.current_device()
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        raise KernelsUnavailableError(
            f"the {kernels} kernels need compute capability {OLDEST_CAPABILITY}, device {index} has {capability}"
        )
    return torch.device("cuda", index)
