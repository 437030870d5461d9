"""What the host offers: cores, memory, types that it multiplies natively, whether it could have a GPU. No torch."""

from __future__ import annotations

import os
from pathlib import Path

CPU_MEMORY_FRACTION = 0.25

# What the drivers of NVIDIA's GPUs put there, on Linux and in WSL.
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


def may_have_gpu() -> bool:
    """False if there is surely no CUDA device, so that torch need not be asked, whose import takes seconds."""
    return any(Path(device).exists() for device in _GPU_DEVICES)


def cpu_multiplies_bfloat16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def num_available_cores() -> int:
    return len(os.sched_getaffinity(0))


def host_kv_cache_budget(fraction: float | None) -> int:
    """Bytes that a KV pool in host memory may take now that the weights are loaded."""
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
