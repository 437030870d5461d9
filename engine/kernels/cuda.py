"""The CUDA kernels of csrc/cuda (libquire_cuda.so)."""

from __future__ import annotations

import torch

from engine.errors import ConfigError
from engine.kernels import abi
from engine.kernels.library import load_library
from engine.kernels.native import NativeBackend


class CudaBackend(NativeBackend):
    """Kernels for NVIDIA GPUs from compute capability 8.0 on; float32, bfloat16 and float16.

    Head dimensions of paged attention: 64, 80, 96, 128 and 256. Work is queued on torch's current stream of the
    current device; nothing waits for it. Values that lie in device memory (slots, lengths, block ids) are trusted.
    A row's result is bitwise the same whatever its batch and chunk.

    Raises:
        ConfigError: the library or a usable GPU is not there, with the reason.
    """

    name = "cuda"

    def __init__(self) -> None:
        library, reason = load_library("cuda")
        if library is None:
            raise ConfigError(f"the cuda kernels are not available: {reason}")
        if not torch.cuda.is_available():
            raise ConfigError("the cuda kernels are not available: torch sees no CUDA device")
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            raise ConfigError(f"the cuda kernels need compute capability 8.0 or later, this device has {major}.{minor}")
        super().__init__(library, "cuda", num_threads=0)

    def _stream(self) -> int | None:
        return torch.cuda.current_stream().cuda_stream

    def _attach_workspace(self, params: abi.PagedAttentionParams, query: torch.Tensor) -> None:
        needed = self.library.attention_workspace(params)
        # torch's allocator orders the scratch on the current stream: freed here, reused there only after this call.
        scratch = torch.empty(needed, dtype=torch.uint8, device=query.device) if needed else None
        params.workspace = scratch.data_ptr() if scratch is not None else None
        params.workspace_bytes = needed
