"""Paged attention as an operation: the plan's launches, and the merge of what they split."""

from __future__ import annotations

import torch
import triton.language as tl

from engine.kernels.backend import AttentionMetadata
from engine.kernels.triton.attention_plan import AttentionShape, Launch, pad_dim, plan_attention
from engine.kernels.triton.paged_attention import merge_kernel, paged_attention_kernel

LOG2_E = 1.4426950408889634
DOT_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class PagedAttention:
    """Attention of one backend.

    Args:
        num_processors: multiprocessors of the device, which the plan wants to fill.
        batch_invariant: see attention_plan.py.
    """

    def __init__(self, device: torch.device, num_processors: int, batch_invariant: bool) -> None:
        self._num_processors = num_processors
        self._batch_invariant = batch_invariant
        # The sums' arguments where nothing is split: of their type, as another would be another kernel.
        self._no_partials = torch.empty(1, dtype=torch.float32, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = key_cache.shape[1]
        dot_type = query.dtype if query.dtype == key_cache.dtype else torch.float32
        shape = AttentionShape(
            num_seqs=metadata.seq_lens.shape[0],
            num_tokens=num_tokens,
            max_query_len=metadata.max_query_len,
            max_seq_len=metadata.max_seq_len,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            head_dim=head_dim,
            wide=dot_type == torch.float32,
        )
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for launch in plan_attention(shape, self._num_processors, self._batch_invariant):
            self._launch(launch, shape, out, query, key_cache, value_cache, metadata, scale, sliding_window, dot_type)
        return out

    def _launch(
        self,
        launch: Launch,
        shape: AttentionShape,
        out: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
        dot_type: torch.dtype,
    ) -> None:
        num_heads = query.shape[1]
        partial_out = partial_stats = self._no_partials
        if launch.num_splits > 1:
            parts = (shape.num_seqs * launch.partial_rows, num_heads, launch.num_splits)
            partial_out = partial_stats.new_empty((*parts, shape.head_dim))
            partial_stats = partial_stats.new_empty((*parts, 2))
        constants = {"HEAD_DIM": shape.head_dim, "PADDED_DIM": pad_dim(shape.head_dim)}
        paged_attention_kernel[launch.num_tiles, shape.num_kv_heads, launch.num_splits](
            out,
            query,
            key_cache,
            value_cache,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_tables,
            partial_out,
            partial_stats,
            scale * LOG2_E,
            sliding_window or 0,
            shape.num_tokens,
            shape.num_seqs,
            launch.min_query_len,
            launch.max_query_len,
            launch.num_splits,
            int(launch.one_tile),
            launch.partial_rows,
            *query.stride()[:2],
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            metadata.block_tables.stride(0),
            GROUP=shape.group,
            BLOCK_SIZE=key_cache.shape[2],
            LANES=launch.tile.lanes,
            TOKENS=launch.tile.tokens,
            SEGMENT=launch.segment,
            DOT_TYPE=DOT_TYPES[dot_type],
            num_warps=launch.tile.num_warps,
            num_stages=launch.tile.num_stages,
            enable_fp_fusion=not self._batch_invariant,
            **constants,
        )
        if launch.num_splits > 1:
            merge_kernel[shape.num_seqs * launch.partial_rows, num_heads](
                out,
                partial_out,
                partial_stats,
                metadata.query_start_loc,
                launch.min_query_len,
                launch.max_query_len,
                launch.num_splits,
                launch.partial_rows,
                num_warps=1,
                enable_fp_fusion=not self._batch_invariant,
                **constants,
            )
