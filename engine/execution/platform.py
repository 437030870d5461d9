"""What the machine offers: devices, types it multiplies natively, cores and memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.errors import ConfigError

GPU_MEMORY_FRACTION = 0.9
CPU_MEMORY_FRACTION = 0.25


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device on this machine")
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


def cpu_multiplies_bfloat16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def num_available_cores() -> int:
    return len(os.sched_getaffinity(0))


def kv_cache_budget(device: torch.device, fraction: float | None) -> int:
    """Bytes that the KV pool may take now that the weights are loaded."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1.0 - (fraction or GPU_MEMORY_FRACTION)))
    return int(available_host_memory() * (fraction or CPU_MEMORY_FRACTION))


def available_host_memory() -> int:
    """Bytes that can still be allocated: the kernel's estimate, within the control group's limit if there is one."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * int(line.split()[1])
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            available = min(available, int(limit) - used)
    except OSError:
        pass  # no such file on this system: the page count above stands
    return max(0, available)
