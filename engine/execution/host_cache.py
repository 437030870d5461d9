"""The KV pool in host memory and its swap pool, for the native CPU engine: blocks are opaque bytes (§4.3, §4.5)."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np

from engine.config import CacheConfig
from engine.execution.swap_cost import measure_swap_cost
from engine.kernels.abi import CopyBlocksParams
from engine.kernels.library import KernelLibrary
from engine.loading.stored_tensor import ByteArray
from engine.memory import BlockCopy
from engine.preemption import SwapCost


class HostCache:
    """Owns both pools: uint8 `[num_blocks, block_bytes]`; a block's layout is csrc/cpu/kv_layout.h."""

    def __init__(self, library: KernelLibrary, cache: CacheConfig, block_bytes: int) -> None:
        self.kv_pool = _pool(cache.num_blocks, block_bytes)
        self.swap_pool = _pool(cache.num_swap_blocks, block_bytes)
        self._library = library

    def swap_out(self, copies: Sequence[BlockCopy]) -> None:
        for source, destination in copies:
            self.swap_pool[destination] = self.kv_pool[source]

    def swap_in(self, copies: Sequence[BlockCopy]) -> None:
        for source, destination in copies:
            self.kv_pool[destination] = self.swap_pool[source]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks within the pool, in order."""
        if not copies:
            return
        pairs = np.array(copies, dtype=np.int64)
        params = CopyBlocksParams()
        params.pool, params.pairs = self.kv_pool.ctypes.data, pairs.ctypes.data
        params.num_blocks, params.block_bytes = self.kv_pool.shape
        params.num_pairs, params.num_threads = len(copies), 1
        self._library.call("copy_blocks", params)

    def measure_swap_cost(self) -> SwapCost:
        """Time a few block copies each way. Call it before the pool holds anything."""
        num_blocks = min(len(self.kv_pool), len(self.swap_pool))
        return measure_swap_cost(self.swap_out, self.swap_in, num_blocks, self.kv_pool.shape[1])


def _pool(num_blocks: int, block_bytes: int) -> ByteArray:
    """Zeroed pages, taken as they are first written; large ones where the system has them, as a block's parts lie far
    from the next block's."""
    if num_blocks == 0:
        return np.empty((0, block_bytes), dtype=np.uint8)
    memory = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8).reshape(num_blocks, block_bytes)
