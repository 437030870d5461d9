"""The KV pool's memory, the host's swap pool, and the copies of whole blocks within and between them (§4.3, §4.5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.config import CacheConfig
from engine.execution.swap_cost import measure_swap_cost
from engine.kernels.backend import KernelBackend
from engine.memory import BlockCopy
from engine.model_config import ModelConfig
from engine.preemption import SwapCost


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

    @staticmethod
    def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block of all layers."""
        return model.num_layers * 2 * model.num_kv_heads * block_size * model.head_dim * dtype.itemsize

    def swap_out(self, copies: Sequence[BlockCopy]) -> None:
        """Copy device blocks to the host; done when this returns."""
        self._swap(self.kv_pool, self.swap_pool, copies)

    def swap_in(self, copies: Sequence[BlockCopy]) -> None:
        """Copy host blocks to the device; what is launched on the device's stream afterwards sees them."""
        self._swap(self.swap_pool, self.kv_pool, copies)

    def _swap(self, source: torch.Tensor, destination: torch.Tensor, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            destination[copy.destination].copy_(source[copy.source], non_blocking=True)
        if copies and self.kv_pool.device.type == "cuda":
            torch.cuda.current_stream(self.kv_pool.device).synchronize()

    def measure_swap_cost(self) -> SwapCost:
        """Time a few block copies each way. Call it before the pool holds anything."""
        num_blocks = min(len(self.kv_pool), len(self.swap_pool))
        return measure_swap_cost(self.swap_out, self.swap_in, num_blocks, self.kv_pool[0].nbytes)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        if copies:
            self._kernels.copy_blocks(self.kv_pool, torch.from_numpy(np.array(copies, dtype=np.int64)))
