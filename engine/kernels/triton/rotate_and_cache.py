"""Rotary embedding of query and key in place, and the step's key and value into their slots of the KV cache.

One program for each token and KV head: the group's query heads, the key and the value.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.backend import AttentionMetadata
from engine.kernels.library import KernelError
from engine.kernels.triton.attention_plan import next_power_of_two


@triton.jit
def rotate_and_cache_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    slot_mapping: tl.tensor,
    key_cache: tl.tensor,
    value_cache: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_cache_head_stride: tl.tensor,
    key_slot_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_cache_head_stride: tl.tensor,
    value_slot_stride: tl.tensor,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """HALF: half a head's dimensions; a rotated pair is one of the first half and its counterpart in the second."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, PADDED_HALF)
    inside = dims < HALF

    keys = key + token * key_token_stride + kv_head * key_head_stride + dims
    first, second = tl.load(keys, mask=inside), tl.load(keys + HALF, mask=inside)
    if ROTATE:
        angles = cos_sin + tl.load(positions + token) * (2 * HALF) + dims
        cos, sin = tl.load(angles, mask=inside), tl.load(angles + HALF, mask=inside)
        first, second = rotated(first, second, cos, sin)
        tl.store(keys, first, mask=inside)
        tl.store(keys + HALF, second, mask=inside)

        heads = tl.arange(0, PADDED_GROUP)[:, None]
        rows = (heads < GROUP) & inside[None, :]
        queries = query + token * query_token_stride + (kv_head * GROUP + heads) * query_head_stride + dims[None, :]
        query_first, query_second = rotated(
            tl.load(queries, mask=rows), tl.load(queries + HALF, mask=rows), cos[None, :], sin[None, :]
        )
        tl.store(queries, query_first, mask=rows)
        tl.store(queries + HALF, query_second, mask=rows)

    slot = tl.load(slot_mapping + token)
    if slot >= 0:  # padding has -1
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        cached = (
            key_cache + block * key_block_stride + kv_head * key_cache_head_stride + offset * key_slot_stride + dims
        )
        tl.store(cached, first.to(key_cache.dtype.element_ty), mask=inside)
        tl.store(cached + HALF, second.to(key_cache.dtype.element_ty), mask=inside)
        values = value + token * value_token_stride + kv_head * value_head_stride + dims
        cached = (
            value_cache
            + block * value_block_stride
            + kv_head * value_cache_head_stride
            + offset * value_slot_stride
            + dims
        )
        first, second = tl.load(values, mask=inside), tl.load(values + HALF, mask=inside)
        tl.store(cached, first.to(value_cache.dtype.element_ty), mask=inside)
        tl.store(cached + HALF, second.to(value_cache.dtype.element_ty), mask=inside)


@triton.jit
def rotated(first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor):
    """Both halves turned by their angles, in float32, rounded to the heads' type."""
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = wide_first * cos - wide_second * sin
    turned_second = wide_second * cos + wide_first * sin
    return turned_first.to(first.dtype), turned_second.to(second.dtype)


def launch_rotate_and_cache(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos_sin: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    if head_dim % 2:
        raise KernelError(f"head_dim={head_dim} must be even")
    if not num_tokens:
        return
    group = num_heads // num_kv_heads
    rotate_and_cache_kernel[num_tokens, num_kv_heads](
        query,
        key,
        value,
        metadata.positions if cos_sin is None else cos_sin,
        metadata.positions,
        metadata.slot_mapping,
        key_cache,
        value_cache,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        GROUP=group,
        PADDED_GROUP=next_power_of_two(group),
        HALF=head_dim // 2,
        PADDED_HALF=next_power_of_two(head_dim // 2),
        BLOCK_SIZE=block_size,
        ROTATE=cos_sin is not None,
        num_warps=1 if group * head_dim <= 1024 else 4,
    )
