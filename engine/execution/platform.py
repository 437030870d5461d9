"""What torch finds on the machine: devices, types they multiply natively, their memory. engine/execution/host.py has
what can be said without it."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.execution.host import cpu_multiplies_bfloat16, host_kv_cache_budget

GPU_MEMORY_FRACTION = 0.9


def num_gpus() -> int:
    """CUDA devices that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve_device(name: str, rank: int = 0) -> torch.device:
    """The device named. Ranks of one node that see the same GPUs take one each; where each sees only its own, that."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device on this machine")
    if name == "cuda" and rank > 0:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type named, or for "auto" bfloat16 where the hardware multiplies it natively and float32 elsewhere."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bfloat16()
        return torch.bfloat16 if native else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    if dtype is torch.float16 and device.type == "cpu":
        raise ConfigError("dtype='float16' is not supported on a CPU; use float32 or bfloat16")
    return dtype


def kv_cache_budget(device: torch.device, fraction: float | None) -> int:
    """Bytes that the KV pool may take now that the weights are loaded."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1.0 - (fraction or GPU_MEMORY_FRACTION)))
    return host_kv_cache_budget(fraction)
