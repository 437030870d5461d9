"""Other implementations of attention, as far as they can be imported: each on the data that Quire computes on.

A peer whose layout is another gets a copy of two layers in its own; what it cannot do is named, not left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from benchmarks.gpu.attention import BLOCK_SIZE, AttentionData

# Calls on different layers, each of which returns `[num_tokens, num_heads, head_dim]`.
Calls = Sequence[Callable[[], torch.Tensor]]


class PeerMissingError(Exception):
    """The peer cannot run here; the message says why."""


def sdpa(data: AttentionData) -> Calls:
    """torch's scaled_dot_product_attention over contiguous keys and values: no paging, so more a bound."""
    case = data.case
    query = data.query.view(case.num_seqs, case.num_rows, case.num_heads, case.head_dim).transpose(1, 2)
    mask: Any = None
    if 1 < case.num_rows < case.seq_len:
        mask = causal_lower_right(case.num_rows, case.seq_len)  # which leaves the choice of a fast kernel open

    def make(key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            out = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None and case.num_rows > 1, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(-1, case.num_heads, case.head_dim)

        return call

    return [make(*data.dense(index)) for index in range(2)]


def flashinfer(data: AttentionData) -> Calls:
    """FlashInfer's paged wrappers; its layout [blocks, 2, heads, slots, dim] is one layer of ours."""
    module = _import("flashinfer")
    case = data.case
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    indptr = torch.arange(case.num_seqs + 1, dtype=torch.int32, device="cuda") * case.blocks_per_seq
    last = torch.full((case.num_seqs,), (case.seq_len - 1) % BLOCK_SIZE + 1, dtype=torch.int32, device="cuda")
    indices = data.metadata.block_tables.flatten()
    common: dict[str, Any] = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    heads = (case.num_heads, case.num_kv_heads, case.head_dim, BLOCK_SIZE)
    if case.num_rows == 1:
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last, *heads, **common)
    else:
        wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(data.metadata.query_start_loc, indptr, indices, last, *heads, causal=True, **common)
    layers = [data.pool[:, index].contiguous() for index in range(2)]
    return [lambda layer=layer: wrapper.run(data.query, layer) for layer in layers]  # type: ignore[misc]


def flash_attention_3(data: AttentionData) -> Calls:
    """FlashAttention-3 with a page table; its layout is [blocks, slots, heads, dim]."""
    module = _import("flash_attn_interface")
    case, metadata = data.case, data.metadata
    query = data.query.view(case.num_seqs, case.num_rows, case.num_heads, case.head_dim)
    layers = [
        tuple(cache.transpose(1, 2).contiguous() for cache in data.layer(index)) for index in range(2)
    ]  # fmt: skip

    def make(key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            out = module.flash_attn_with_kvcache(
                query, key, value, cache_seqlens=metadata.seq_lens, page_table=metadata.block_tables, causal=True,
                softmax_scale=data.scale,
            )  # fmt: skip
            result: torch.Tensor = out[0] if isinstance(out, tuple) else out
            return result.view(-1, case.num_heads, case.head_dim)

        return call

    return [make(key, value) for key, value in layers]


def vllm_triton(data: AttentionData) -> Calls:
    """vLLM's Triton kernel over [blocks, slots, heads, dim]."""
    module = _import("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention")
    case, metadata = data.case, data.metadata
    layers = [
        tuple(cache.transpose(1, 2).contiguous() for cache in data.layer(index)) for index in range(2)
    ]  # fmt: skip

    def make(key: torch.Tensor, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        out = torch.empty_like(data.query)

        def call() -> torch.Tensor:
            module.unified_attention(
                q=data.query, k=key, v=value, out=out, cu_seqlens_q=metadata.query_start_loc,
                max_seqlen_q=case.num_rows, seqused_k=metadata.seq_lens, max_seqlen_k=case.seq_len,
                softmax_scale=data.scale, causal=True, window_size=(-1, -1), block_table=metadata.block_tables,
                softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
            )  # fmt: skip
            return out

        return call

    return [make(key, value) for key, value in layers]


def flex_attention(data: AttentionData) -> Calls:
    """torch's FlexAttention with its paged cache, compiled; a prototype that wants pages in one long sequence."""
    flex = _import("torch.nn.attention.flex_attention")
    paged_module = _import("torch.nn.attention.experimental._paged_attention")
    case = data.case
    page = 128  # its mask works in tiles of this size
    num_pages = case.num_seqs * -(-case.seq_len // page)
    paged = paged_module.PagedAttention(num_pages, page, case.num_seqs, device="cuda")
    lengths = torch.full((case.num_seqs,), case.seq_len, device="cuda")
    for seq in range(case.num_seqs):
        paged.reserve(torch.tensor(seq, device="cuda"), lengths[seq])
    first = case.seq_len - case.num_rows

    def causal(_batch: Any, _head: Any, row: Any, token: Any) -> Any:
        return row + first >= token

    mask = flex.create_block_mask(causal, case.num_seqs, 1, case.num_rows, case.seq_len, device="cuda")
    mask = paged.convert_logical_block_mask(mask)
    query = data.query.view(case.num_seqs, case.num_rows, case.num_heads, case.head_dim).transpose(1, 2)
    attend: Any = torch.compile(flex.flex_attention)
    shape = (1, case.num_kv_heads, num_pages * page, case.head_dim)
    positions = torch.arange(case.seq_len, device="cuda").expand(case.num_seqs, -1)
    seqs = torch.arange(case.num_seqs, device="cuda")

    def make(index: int) -> Callable[[], torch.Tensor]:
        key, value = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        paged.assign(seqs, positions, *data.dense(index), key, value)

        def call() -> torch.Tensor:
            out: torch.Tensor = attend(query, key, value, block_mask=mask, enable_gqa=True)
            return out.transpose(1, 2).reshape(-1, case.num_heads, case.head_dim)

        return call

    return [make(index) for index in range(2)]


PEERS: dict[str, Callable[[AttentionData], Calls]] = {
    "torch SDPA (dense)": sdpa,
    "FlashInfer": flashinfer,
    "FlashAttention-3": flash_attention_3,
    "vLLM Triton": vllm_triton,
    "FlexAttention paged": flex_attention,
}
SLOW_TO_COMPILE = frozenset({"FlexAttention paged"})


def _import(*names: str) -> Any:
    """The first of these modules that is there."""
    reasons = []
    for name in names:
        try:
            return import_module(name)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise PeerMissingError(f"absent: {reasons[-1].splitlines()[0]}")
