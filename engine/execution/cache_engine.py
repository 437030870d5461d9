"""The KV pool's memory and the copies of whole blocks within it (§4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.config import CacheConfig, ModelConfig
from engine.kernels.backend import KernelBackend
from engine.memory import BlockCopy


class CacheEngine:
    """Owns the pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, a block one run of bytes."""

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

    @staticmethod
    def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block of all layers."""
        return model.num_layers * 2 * model.num_kv_heads * block_size * model.head_dim * dtype.itemsize

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        if copies:
            self._kernels.copy_blocks(self.kv_pool, torch.from_numpy(np.array(copies, dtype=np.int64)))
