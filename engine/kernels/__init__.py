"""One dispatch per operation over cpu (csrc), cuda (csrc), triton and reference (plain torch)."""

from __future__ import annotations

import logging

from engine.errors import ConfigError
from engine.kernels.backend import AttentionMetadata, KernelBackend

__all__ = ["AttentionMetadata", "KernelBackend", "select_backend"]

logger = logging.getLogger(__name__)

_DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}


def select_backend(
    name: str, device: str, num_threads: int, batch_invariant: bool = False, head_dim: int | None = None
) -> KernelBackend:
    """The kernels to run on a device. Libraries, Triton and torch are loaded only when asked for here.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" for the device's own kernels: on a GPU the CUDA library's,
            Triton's without it, and without either, as on a CPU without its library, the reference.
        device: "cpu" or "cuda", with or without an index.
        num_threads: threads of one CPU call.
        batch_invariant: a row's results must be the same bits whatever its batch. On a GPU only Triton's products are;
            the CUDA library, where it was built, then computes all but them, and Triton all without it.
        head_dim: of the model, so that "auto" does not take kernels without its size; None if any will do.

    Raises:
        ConfigError: an unknown name, kernels of another device, or kernels that are asked for by name, or for
            batch_invariant, and not there.
    """
    device_type = device.split(":")[0]
    if device_type not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r} must be cpu or cuda")
    if name not in ("auto", "reference", *_DEVICES):
        raise ConfigError(f"kernels={name!r} must be one of auto, reference, {', '.join(_DEVICES)}")
    if batch_invariant:
        _check_batch_invariant(name, device_type)
        return _build_invariant(name, num_threads, head_dim)
    if name == "auto":
        return _select_automatically(device_type, num_threads, head_dim)
    if name == "reference":
        from engine.kernels.reference import ReferenceBackend

        return ReferenceBackend()
    if _DEVICES[name] != device_type:
        raise ConfigError(f"kernels={name!r} cannot run on device={device!r}")
    return _build(name, num_threads, batch_invariant)


def _select_automatically(device_type: str, num_threads: int, head_dim: int | None) -> KernelBackend:
    from engine.kernels.library import KernelsUnavailableError
    from engine.kernels.reference import ReferenceBackend

    for name in (name for name, its_device in _DEVICES.items() if its_device == device_type):
        try:
            if name == "cuda":
                _check_head_dim(head_dim)
            return _build(name, num_threads, batch_invariant=False)
        except KernelsUnavailableError as error:
            logger.warning("doing without kernels=%s: %s", name, error)
    logger.warning("using the reference kernels, which are slow")
    return ReferenceBackend()


def _check_batch_invariant(name: str, device_type: str) -> None:
    if device_type == "cpu":
        raise ConfigError(
            "batch_invariant=True on a CPU needs the native engine (kernels='native', or 'auto' and its library): "
            "torch's products depend on the number of rows"
        )
    if name not in ("auto", "cuda", "triton"):
        raise ConfigError(f"batch_invariant=True needs kernels='auto', 'cuda' or 'triton' on a GPU, not {name!r}")


def _check_head_dim(head_dim: int | None) -> None:
    from engine.kernels.cuda import HEAD_DIMS
    from engine.kernels.library import KernelsUnavailableError

    if head_dim is not None and head_dim not in HEAD_DIMS:
        raise KernelsUnavailableError(f"the cuda kernels have no head_dim={head_dim}, only {sorted(HEAD_DIMS)}")


def _build_invariant(name: str, num_threads: int, head_dim: int | None) -> KernelBackend:
    """Triton's kernels, and unless they alone are asked for, the CUDA library's beside them."""
    from engine.kernels.library import KernelsUnavailableError

    triton = _build("triton", num_threads, batch_invariant=True)
    if name == "triton":
        return triton
    from engine.kernels.invariant import InvariantCudaBackend

    try:
        _check_head_dim(head_dim)
        return InvariantCudaBackend(triton)
    except KernelsUnavailableError as error:
        if name == "cuda":
            raise
        logger.warning("computing with Triton alone, and drawing tokens on the host: %s", error)
    return triton


def _build(name: str, num_threads: int, batch_invariant: bool) -> KernelBackend:
    if name == "cpu":
        from engine.kernels.cpu import CpuBackend

        return CpuBackend(num_threads)
    if name == "cuda":
        from engine.kernels.cuda import CudaBackend

        return CudaBackend()
    try:
        from engine.kernels.triton import TritonBackend
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        from engine.kernels.library import KernelsUnavailableError

        raise KernelsUnavailableError("the triton kernels are not available: pip install 'triton>=3.6'") from None
    return TritonBackend(batch_invariant)
