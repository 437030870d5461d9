"""The CUDA kernels of csrc/cuda (libquire_cuda.so)."""

from __future__ import annotations

import torch

from engine.kernels import abi
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.kernels.gpu import find_gpu
from engine.kernels.library import KernelsUnavailableError, load_library
from engine.kernels.native import NativeBackend

HEAD_DIMS = frozenset({64, 80, 96, 128, 256})  # of paged attention
INVARIANT_SPLIT_TOKENS = 2048  # long enough that few rows have partial results to merge


class CudaBackend(NativeBackend):
    """Kernels for NVIDIA GPUs of compute capability 8.0 and later; float32, bfloat16 and float16.

    They belong to the device that was torch's current one when the backend was made. Work is queued on torch's current
    stream of that device; nothing waits for it. Values in device memory (slots, lengths, block ids) are trusted.

    Paged attention has head dimensions 64, 80, 96, 128 and 256. It runs on tensor cores where query and cache are both
    bfloat16 or both float16 and a block has 16 tokens or more; on CUDA cores, several times slower, elsewhere. A call
    can be captured in a CUDA graph: its launches depend on shapes and on the metadata's `max_query_len` and
    `max_seq_len`, never on the lengths and tables in device memory, which a replay reads as they are then. A graph is
    captured with the largest values that it will meet; in batches of decodes (`max_query_len` 1) a `max_seq_len` far
    above the real lengths costs nothing. Sequences without rows, and rows past the last sequence, may pad a batch.

    Args:
        batch_invariant: each row's result is bitwise the same alone, in any batch and in any chunk. Costs decodes some
            of their speed, since they are computed as prompts are. The other operations always are invariant.

    Attributes:
        cuda_only: what no other backend has.

    Raises:
        KernelsUnavailableError: the library or a usable GPU is not there, with the reason.
    """

    name = "cuda"

    def __init__(self, batch_invariant: bool = False) -> None:
        library, reason = load_library("cuda")
        if library is None:
            raise KernelsUnavailableError(f"the cuda kernels are not available: {reason}")
        split_tokens = INVARIANT_SPLIT_TOKENS if batch_invariant else 0
        super().__init__(library, str(find_gpu(self.name)), num_threads=0, split_tokens=split_tokens)
        self.cuda_only = CudaOnlyKernels(library, self._stream)

    def _stream(self) -> int | None:
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def _attach_workspace(self, params: abi.PagedAttentionParams, query: torch.Tensor) -> None:
        needed = self.library.attention_workspace(params)
        # torch's allocator hands memory out again in stream order: this call is done with it before the next user.
        scratch = torch.empty(needed, dtype=torch.uint8, device=query.device) if needed else None
        params.workspace = scratch.data_ptr() if scratch is not None else None
        params.workspace_bytes = needed
