"""Blocks that move between the native engine's pool and its swap pool, and within the pool."""

from __future__ import annotations

import numpy as np
import pytest

from engine.config import CacheConfig
from engine.execution.host_cache import HostCache
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelError
from engine.memory import BlockCopy

BLOCK_BYTES = 72


def make_cache(cpu: CpuBackend, num_swap_blocks: int = 4) -> HostCache:
    cache = HostCache(cpu.library, CacheConfig(16, 8, False, num_swap_blocks), BLOCK_BYTES)
    cache.kv_pool[:] = np.arange(8, dtype=np.uint8)[:, None]
    return cache


def first_bytes(pool: np.ndarray) -> list[int]:
    assert (pool == pool[:, :1]).all(), "a block was moved in part"
    values: list[int] = pool[:, 0].tolist()
    return values


def test_both_pools_begin_as_zeros(cpu: CpuBackend) -> None:
    cache = HostCache(cpu.library, CacheConfig(16, 8, False, 4), BLOCK_BYTES)
    assert (cache.kv_pool.shape, cache.swap_pool.shape) == ((8, BLOCK_BYTES), (4, BLOCK_BYTES))
    assert not cache.kv_pool.any()
    assert not cache.swap_pool.any()
    assert make_cache(cpu, num_swap_blocks=0).swap_pool.shape == (0, BLOCK_BYTES)


def test_blocks_come_back_from_where_they_went(cpu: CpuBackend) -> None:
    cache = make_cache(cpu)
    cache.swap_out([BlockCopy(5, 0), BlockCopy(2, 3)])
    assert first_bytes(cache.swap_pool) == [5, 0, 0, 2]
    cache.swap_in([BlockCopy(3, 0), BlockCopy(0, 7)])
    assert first_bytes(cache.kv_pool) == [2, 1, 2, 3, 4, 5, 6, 5]


def test_copies_are_done_in_order(cpu: CpuBackend) -> None:
    cache = make_cache(cpu)
    cache.copy([BlockCopy(1, 2), BlockCopy(2, 3), BlockCopy(6, 1)])
    assert first_bytes(cache.kv_pool) == [0, 6, 1, 1, 4, 5, 6, 7]
    cache.copy([])
    with pytest.raises(KernelError, match="8"):
        cache.copy([BlockCopy(0, 8)])


def test_the_cost_of_swapping_is_measured(cpu: CpuBackend) -> None:
    cost = make_cache(cpu).measure_swap_cost()
    assert cost.block_bytes == BLOCK_BYTES
    assert cost.out_bytes_per_s > 0
    assert cost.in_bytes_per_s > 0
