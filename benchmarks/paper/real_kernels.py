"""Times this project's CPU kernels and block copies as the paper's §7.1 and §7.3 time the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.config import CacheConfig
from engine.execution.cache_engine import CacheEngine
from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.memory import BlockCopy
from engine.model_config import ModelConfig

# Rotated through, so that every call finds its keys and values in memory and not in the last-level cache.
_POOL_BYTES = 160 << 20


class AttentionShape(NamedTuple):
    num_heads: int
    head_dim: int
    num_seqs: int
    context: int


def attention_seconds(kernels: KernelBackend, shape: AttentionShape, block_size: int, seconds: float) -> float:
    """One decode step's attention in one layer, float32, blocks in random order. Best of several.

    `block_size` equal to the context is the contiguous case: each sequence's keys lie in one run.
    """
    blocks_each = -(-shape.context // block_size)
    num_blocks = shape.num_seqs * blocks_each
    layer_shape = (num_blocks, 2, shape.num_heads, block_size, shape.head_dim)
    layer_bytes = 4 * torch.Size(layer_shape).numel()
    layers = [torch.randn(layer_shape) for _ in range(max(1, -(-_POOL_BYTES // layer_bytes)))]
    query = torch.randn(shape.num_seqs, shape.num_heads, shape.head_dim)
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(shape.num_seqs + 1, dtype=torch.int32),
        seq_lens=torch.full((shape.num_seqs,), shape.context, dtype=torch.int32),
        block_tables=torch.randperm(num_blocks).int().view(shape.num_seqs, blocks_each),
        slot_mapping=torch.full((shape.num_seqs,), -1),
        positions=torch.full((shape.num_seqs,), shape.context - 1),
        max_query_len=1,
        max_seq_len=shape.context,
    )

    def call(i: int) -> None:
        layer = layers[i % len(layers)]
        kernels.paged_attention(query, layer[:, 0], layer[:, 1], metadata, shape.head_dim**-0.5)

    return best_seconds(call, seconds)


def swap_seconds(
    model: ModelConfig, kernels: KernelBackend, block_size: int, num_tokens: int, seconds: float
) -> tuple[float, float]:
    """Copying that many tokens' blocks of all layers out to the swap pool, and back in. Best of several."""
    num_blocks = -(-num_tokens // block_size)
    # Eight times the blocks, scattered: neighbours in a block table are no neighbours in the pool.
    cache_config = CacheConfig(block_size, 8 * num_blocks, False, 8 * num_blocks)
    cache = CacheEngine(model, cache_config, torch.float32, torch.device("cpu"), kernels)
    cache.kv_pool.zero_()
    cache.swap_pool.zero_()
    orders = [torch.randperm(8 * num_blocks)[:num_blocks].tolist() for _ in range(2)]
    copies = [BlockCopy(source, destination) for source, destination in zip(*orders, strict=True)]
    back = [BlockCopy(copy.destination, copy.source) for copy in copies]
    return best_seconds(lambda _: cache.swap_out(copies), seconds), best_seconds(lambda _: cache.swap_in(back), seconds)


def best_seconds(call: Callable[[int], object], seconds: float) -> float:
    """The shortest call(i), i counting up, over at least three calls and `seconds`."""
    call(0)
    best, begin, i = float("inf"), time.perf_counter(), 1
    while i <= 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call(i)
        best = min(best, time.perf_counter() - start)
        i += 1
    return best
