"""The KV pool's memory, the host's swap pool, and the copies of whole blocks within and between them (§4.3, §4.5)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, cast

import torch

from engine.config import CacheConfig
from engine.execution.pinned import PinnedPair
from engine.execution.swap_cost import measure_swap_cost
from engine.execution.swap_stream import SwapStream
from engine.kernels.backend import KernelBackend
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.memory import BlockCopy
from engine.model_config import ModelConfig
from engine.preemption import SwapCost
from engine.scheduling import SchedulerOutput


class CacheEngine:
    """Owns the pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, a block one run of bytes.

    The swap pool on the host has the same layout, and pinned memory where a GPU copies to and from it.
    """

    def __init__(
        self,
        model: ModelConfig,
        cache: CacheConfig,
        dtype: torch.dtype,
        device: torch.device,
        kernels: KernelBackend,
    ) -> None:
        self._kernels = kernels
        shape = (cache.num_blocks, model.num_layers, 2, model.num_kv_heads, cache.block_size, model.head_dim)
        # Unwritten slots are never read, so the pages need not be touched before they are used.
        self.kv_pool = torch.empty(shape, dtype=dtype, device=device)
        swap_shape = (cache.num_swap_blocks, *shape[1:])
        self.swap_pool = torch.empty(swap_shape, dtype=dtype, pin_memory=device.type == "cuda")
        self._copy_pairs = PinnedPair((cache.num_blocks, 2), torch.int64, device)
        self._cuda_only: CudaOnlyKernels | None = getattr(kernels, "cuda_only", None)
        self._stream: SwapStream | None = None
        if cache.num_swap_blocks and self._cuda_only is not None:
            self._pairs = PinnedPair((min(cache.num_blocks, cache.num_swap_blocks), 2), torch.int64, device)
        if cache.num_swap_blocks and device.type == "cuda":
            self._stream = SwapStream(
                torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
                lambda: torch.cuda.current_stream(device),
                lambda stream: torch.cuda.stream(cast(torch.cuda.Stream, stream)),
                self._move,
            )

    @staticmethod
    def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block of all layers."""
        return model.num_layers * 2 * model.num_kv_heads * block_size * model.head_dim * dtype.itemsize

    def begin_step(self, output: SchedulerOutput) -> None:
        """Do what comes before a step's rows: what is launched on the device's stream afterwards sees it done."""
        swap_out, swap_in, copies = output.blocks_to_swap_out, output.blocks_to_swap_in, output.blocks_to_copy
        if self._stream is not None:
            self._stream.begin_step(swap_out, swap_in, copies, self.copy)
            return
        self._move(swap_out, to_host=True)
        self._move(swap_in, to_host=False)
        self.copy(copies)

    def swap_out(self, copies: Sequence[BlockCopy]) -> None:
        """Copy device blocks to the host; done when this returns."""
        self._move(copies, to_host=True)
        self._synchronize()

    def swap_in(self, copies: Sequence[BlockCopy]) -> None:
        """Copy host blocks to the device; done when this returns."""
        self._move(copies, to_host=False)
        self._synchronize()

    def _move(self, copies: Sequence[BlockCopy], to_host: bool) -> None:
        """Queue the copies on the current stream: as one operation where the library has it."""
        if not copies:
            return
        if self._cuda_only is not None:
            pairs = self._pairs.next().host[: len(copies)]
            pairs.numpy()[:] = copies
            self._cuda_only.swap_blocks(self.kv_pool, self.swap_pool, pairs, to_host=to_host)
            return
        source, destination = (self.kv_pool, self.swap_pool) if to_host else (self.swap_pool, self.kv_pool)
        for copy in copies:
            destination[copy.destination].copy_(source[copy.source], non_blocking=True)

    def _synchronize(self) -> None:
        if self.kv_pool.device.type == "cuda":
            torch.cuda.current_stream(self.kv_pool.device).synchronize()

    def measure_swap_cost(self) -> SwapCost:
        """Time a few block copies each way. Call it before the pool holds anything."""
        num_blocks = min(len(self.kv_pool), len(self.swap_pool))
        with _stream_for_swaps(self.kv_pool.device):
            return measure_swap_cost(self.swap_out, self.swap_in, num_blocks, self.kv_pool[0].nbytes)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Queue copies-on-write, in order, as one launch."""
        if copies:
            pairs = self._copy_pairs.next()
            pairs.host[: len(copies)].numpy()[:] = copies
            self._kernels.copy_blocks(self.kv_pool, pairs.to_device(slice(len(copies))))


def _stream_for_swaps(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A stream to swap on; batched copies do not take the default one."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
