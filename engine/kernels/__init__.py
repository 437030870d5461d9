"""One dispatch per operation over cpu (csrc), cuda (csrc) and reference (plain torch)."""

from __future__ import annotations

import logging

from engine.errors import ConfigError
from engine.kernels.backend import AttentionMetadata, KernelBackend

__all__ = ["AttentionMetadata", "KernelBackend", "select_backend"]

logger = logging.getLogger(__name__)


def select_backend(name: str, device: str, num_threads: int) -> KernelBackend:
    """The kernels to run on a device. Libraries and torch are loaded only when asked for here.

    Args:
        name: "reference", "cpu", "cuda", or "auto" for the device's own kernels, or the reference without them.
        device: "cpu" or "cuda", with or without an index.
        num_threads: threads of one CPU call.

    Raises:
        ConfigError: an unknown name, kernels of another device, or a library that is asked for by name and not there.
    """
    device_type = device.split(":")[0]
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} must be cpu or cuda")
    if name == "auto":
        from engine.kernels.library import KernelsUnavailableError

        try:
            return _native(device_type, num_threads)
        except KernelsUnavailableError as error:
            logger.warning("using the reference kernels, which are slow: %s", error)
            name = "reference"
    if name == "reference":
        from engine.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"kernels={name!r} must be one of auto, reference, cpu, cuda")
    if name != device_type:
        raise ConfigError(f"kernels={name!r} cannot run on device={device!r}")
    return _native(name, num_threads)


def _native(device_type: str, num_threads: int) -> KernelBackend:
    if device_type == "cpu":
        from engine.kernels.cpu import CpuBackend

        return CpuBackend(num_threads)
    from engine.kernels.cuda import CudaBackend

    return CudaBackend()
