"""What only the CUDA library does: draws tokens on the device, and moves blocks to the host and back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.kernels import cuda_abi
from engine.kernels.library import KernelError, KernelLibrary

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# A copy engine moves smaller blocks more slowly than a kernel does; `python -m benchmarks.gpu` measures both.
_COPY_ENGINE_BYTES = 32 * 1024


class CudaOnlyKernels:
    """Calls queued on a stream; nothing waits for them.

    Args:
        stream: the raw stream that the next call is queued on.
    """

    def __init__(self, library: KernelLibrary, stream: Callable[[], int | None]) -> None:
        self._library = library
        self._stream = stream
        self._sample = cuda_abi.SampleParams()
        self._adjust = cuda_abi.AdjustLogitsParams()
        self._swap = cuda_abi.SwapBlocksParams()

    def sample(
        self, logits: torch.Tensor, draws: torch.Tensor, drawn: torch.Tensor, candidates: torch.Tensor | None
    ) -> None:
        """Draw a token for each of `draws`, and list the likeliest ones of those that ask for candidates.

        Args:
            logits: `[num_rows, vocab_size]`, rows contiguous.
            draws, drawn: uint8 `[num_draws, bytes of cuda_abi.DRAW or DRAWN]`, contiguous.
            candidates: uint8 `[num_draws, max_candidates, bytes of cuda_abi.CANDIDATE]`, or None.
        """
        if logits.dim() != 2 or logits.stride(1) != 1 or logits.dtype not in _DTYPES:
            raise KernelError(f"logits are {logits.dtype} {list(logits.shape)}; rows of contiguous floats are wanted")
        num_draws = draws.shape[0]
        _check_bytes("draws", draws, (num_draws, cuda_abi.DRAW.itemsize))
        _check_bytes("drawn", drawn, (num_draws, cuda_abi.DRAWN.itemsize))
        max_candidates = 0 if candidates is None else candidates.shape[1]
        if candidates is not None:
            _check_bytes("candidates", candidates, (num_draws, max_candidates, cuda_abi.CANDIDATE.itemsize))
        params = self._sample
        params.logits, params.draws, params.drawn = logits.data_ptr(), draws.data_ptr(), drawn.data_ptr()
        params.candidates = None if candidates is None else candidates.data_ptr()
        params.stream = self._stream()
        params.logits_row_stride, params.dtype = logits.stride(0), _DTYPES[logits.dtype]
        params.num_draws, params.vocab_size, params.max_candidates = num_draws, logits.shape[1], max_candidates
        self._library.call("sample", params)

    def adjust_logits(
        self, logits: torch.Tensor, rows: torch.Tensor, adjustments: torch.Tensor, drawn: torch.Tensor
    ) -> None:
        """Apply penalties and biases to rows of logits, in place.

        Args:
            logits: float32 `[num_rows, vocab_size]`, contiguous.
            rows: uint8 `[num_rows, bytes of cuda_abi.ADJUSTED_ROW]`.
            adjustments: uint8 `[n, bytes of cuda_abi.ADJUSTMENT]`; token ids are trusted.
            drawn: what the step before drew, as `sample` left it: tokens that rows await.
        """
        if logits.dim() != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
            raise KernelError(f"logits are {logits.dtype} {list(logits.shape)}; contiguous float32 rows are wanted")
        _check_bytes("rows", rows, (len(logits), cuda_abi.ADJUSTED_ROW.itemsize))
        _check_bytes("adjustments", adjustments, (len(adjustments), cuda_abi.ADJUSTMENT.itemsize))
        _check_bytes("drawn", drawn, (len(drawn), cuda_abi.DRAWN.itemsize))
        params = self._adjust
        params.logits, params.rows, params.adjustments = logits.data_ptr(), rows.data_ptr(), adjustments.data_ptr()
        params.drawn, params.stream = drawn.data_ptr(), self._stream()
        params.num_rows, params.vocab_size = logits.shape
        self._library.call("adjust_logits", params)

    def swap_blocks(
        self,
        device_pool: torch.Tensor,
        host_pool: torch.Tensor,
        pairs: torch.Tensor,
        *,
        to_host: bool,
        method: int | None = None,
    ) -> None:
        """Move whole blocks between two pools, blocks first, all in one operation.

        Args:
            host_pool: in pinned memory.
            pairs: int64 `[n, 2]` of (source, destination), in pinned memory; kept as it is until the blocks are moved.
            method: cuda_abi.SWAP_COPY_ENGINE or SWAP_KERNEL; None takes what suits the size of a block.
        """
        if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2 or not pairs.is_contiguous():
            raise KernelError(f"pairs must be contiguous int64 [n, 2], not {pairs.dtype} {list(pairs.shape)}")
        if device_pool.shape[1:] != host_pool.shape[1:] or device_pool.dtype != host_pool.dtype:
            raise KernelError(f"blocks of {list(device_pool.shape[1:])} and {list(host_pool.shape[1:])} differ")
        if not (device_pool.is_contiguous() and host_pool.is_contiguous()):
            raise KernelError("both pools must be contiguous, blocks first")
        block_bytes = device_pool.stride(0) * device_pool.element_size()
        if method is None:
            method = cuda_abi.SWAP_COPY_ENGINE if block_bytes >= _COPY_ENGINE_BYTES else cuda_abi.SWAP_KERNEL
        params = self._swap
        params.device_pool, params.host_pool = device_pool.data_ptr(), host_pool.data_ptr()
        params.pairs, params.stream = pairs.data_ptr(), self._stream()
        params.block_bytes, params.num_pairs = block_bytes, pairs.shape[0]
        params.num_device_blocks, params.num_host_blocks = device_pool.shape[0], host_pool.shape[0]
        params.to_host, params.method = int(to_host), method
        self._library.call("swap_blocks", params)


def _check_bytes(what: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise KernelError(
            f"{what} is {tensor.dtype} {list(tensor.shape)}; contiguous torch.uint8 {list(shape)} is wanted"
        )
