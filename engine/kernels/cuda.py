"""The CUDA kernels of csrc/cuda (libquire_cuda.so)."""

from __future__ import annotations

import torch

from engine.kernels import abi
from engine.kernels.library import KernelError, KernelsUnavailableError, load_library
from engine.kernels.native import NativeBackend

OLDEST_CAPABILITY = (8, 0)  # the first with asynchronous copies to shared memory


class CudaBackend(NativeBackend):
    """Kernels for NVIDIA GPUs of compute capability 8.0 and later; float32, bfloat16 and float16.

    They belong to the device that was torch's current one when the backend was made. Work is queued on torch's current
    stream of that device; nothing waits for it. Values that lie in device memory (slots, lengths, block ids) are
    trusted. Head dimensions of paged attention: 64, 80, 96, 128 and 256. A row's result is bitwise the same whatever
    its batch and chunk.

    Raises:
        KernelsUnavailableError: the library or a usable GPU is not there, with the reason.
    """

    name = "cuda"

    def __init__(self) -> None:
        library, reason = load_library("cuda")
        if library is None:
            raise KernelsUnavailableError(f"the cuda kernels are not available: {reason}")
        if not torch.cuda.is_available():
            raise KernelsUnavailableError("the cuda kernels are not available: torch sees no CUDA device")
        self._device = torch.cuda.current_device()
        capability = torch.cuda.get_device_capability(self._device)
        if capability < OLDEST_CAPABILITY:
            raise KernelsUnavailableError(
                f"the cuda kernels need compute capability {OLDEST_CAPABILITY}, device {self._device} has {capability}"
            )
        super().__init__(library, "cuda", num_threads=0)

    def _stream(self) -> int | None:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream

    def _check_device(self, what: str, tensor: torch.Tensor) -> None:
        super()._check_device(what, tensor)
        if tensor.device.index != self._device:
            raise KernelError(f"{what} is on {tensor.device}, these kernels belong to cuda:{self._device}")

    def _attach_workspace(self, params: abi.PagedAttentionParams, query: torch.Tensor) -> None:
        needed = self.library.attention_workspace(params)
        # torch's allocator hands memory out again in stream order: this call is done with it before the next user.
        scratch = torch.empty(needed, dtype=torch.uint8, device=query.device) if needed else None
        params.workspace = scratch.data_ptr() if scratch is not None else None
        params.workspace_bytes = needed
