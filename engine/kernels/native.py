"""KernelBackend over a library with the C ABI: checks the tensors, fills the structs, calls.

A decode step makes hundreds of these calls, so each thread keeps its structs, and what comes from the metadata (the
same for all layers of a step) is checked and written once a step.
"""

from __future__ import annotations

import threading

import torch
from torch.nn import functional

from engine.kernels import abi
from engine.kernels.backend import AttentionMetadata
from engine.kernels.checks import TensorChecks, check_num_rows
from engine.kernels.library import KernelLibrary

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Structs(threading.local):
    """One thread's structs: a call of another thread must not write into them while this one's is in flight."""

    def __init__(self, num_threads: int, split_tokens: int) -> None:
        self.rms_norm = abi.RmsNormParams()
        self.add_rms_norm = abi.AddRmsNormParams()
        self.silu_and_mul = abi.SiluAndMulParams()
        self.rotate_and_cache = abi.RotateAndCacheParams()
        self.paged_attention = abi.PagedAttentionParams()
        self.copy_blocks = abi.CopyBlocksParams()
        self.metadata: AttentionMetadata | None = None  # what the structs hold now; kept alive with its tensors
        for params in (
            self.rms_norm,
            self.add_rms_norm,
            self.silu_and_mul,
            self.rotate_and_cache,
            self.paged_attention,
            self.copy_blocks,
        ):
            params.num_threads = num_threads
        self.paged_attention.split_tokens = split_tokens


class NativeBackend(TensorChecks):
    """The operations of one library. A subclass names the device and may give a stream and a workspace.

    Args:
        library: a loaded kernel library.
        device: "cpu", or "cuda" with its index; tensors anywhere else are refused.
        num_threads: threads of one call, the caller's included; 0 on CUDA.
        split_tokens: where attention cuts long sequences, as quire.h says; 0 on the CPU.

    Every method raises KernelError for tensors that do not fit.
    """

    def __init__(self, library: KernelLibrary, device: str, num_threads: int, split_tokens: int = 0) -> None:
        super().__init__(torch.device(device))
        self.library = library
        self._structs = _Structs(num_threads, split_tokens)

    def _stream(self) -> int | None:
        """The raw stream that the next call is queued on; None where there are none."""
        return None

    def _attach_workspace(self, params: abi.PagedAttentionParams, query: torch.Tensor) -> None:
        """Point `params.workspace` at enough scratch; called last, with all else filled. The CPU needs none."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """torch's: the vendors' libraries know their machines better than a kernel of ours would."""
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self.check_norm(x, weight)
        # Groups of rows keep the strides of a fused projection.
        rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        params = self._structs.rms_norm
        params.x, params.weight, params.out = rows.data_ptr(), weight.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.x_row_stride, params.x_group_stride, _ = rows.stride()
        params.num_rows, params.num_groups, params.dim = rows.shape
        params.dtype, params.eps = _DTYPES[x.dtype], eps
        self.library.call("rms_norm", params)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        self.check_norm(x, weight, residual)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        params = self._structs.add_rms_norm
        params.x, params.residual = x.data_ptr(), residual.data_ptr()
        params.weight, params.out = weight.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.x_row_stride, params.residual_row_stride = x.stride(0), residual.stride(0)
        params.num_rows, params.dim = x.shape
        params.dtype, params.eps = _DTYPES[x.dtype], eps
        self.library.call("add_rms_norm", params)
        return out

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        """torch's: no kernel of ours is faster."""
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        self.check_gate_up(gate_up)
        num_rows, width = gate_up.shape
        out = torch.empty((num_rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
        params = self._structs.silu_and_mul
        params.gate_up, params.out = gate_up.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.gate_up_row_stride = gate_up.stride(0)
        params.num_rows, params.dim, params.dtype = num_rows, width // 2, _DTYPES[gate_up.dtype]
        self.library.call("silu_and_mul", params)
        return out

    def rotate_and_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        self.check_rotation(query, key, value, cos_sin, key_cache, value_cache)
        self._use_metadata(metadata, query.shape[0])

        params = self._structs.rotate_and_cache
        params.query, params.key, params.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        params.cos_sin, params.max_positions = (None, 0) if cos_sin is None else (cos_sin.data_ptr(), cos_sin.shape[0])
        params.stream = self._stream()
        _fill_view(params.key_cache, key_cache)
        _fill_view(params.value_cache, value_cache)
        params.query_token_stride, params.query_head_stride, _ = query.stride()
        params.key_token_stride, params.key_head_stride, _ = key.stride()
        params.value_token_stride, params.value_head_stride, _ = value.stride()
        params.num_heads = query.shape[1]
        params.num_blocks, params.num_kv_heads, params.block_size, params.head_dim = key_cache.shape
        params.dtype, params.cache_dtype = _DTYPES[query.dtype], _DTYPES[key_cache.dtype]
        self.library.call("rotate_and_cache", params)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        self.check_attention(query, key_cache, value_cache, sliding_window)
        self._use_metadata(metadata, query.shape[0])

        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        params = self._structs.paged_attention
        params.query, params.out, params.stream = query.data_ptr(), out.data_ptr(), self._stream()
        _fill_view(params.key_cache, key_cache)
        _fill_view(params.value_cache, value_cache)
        params.query_token_stride, params.query_head_stride, _ = query.stride()
        params.num_heads = query.shape[1]
        params.num_blocks, params.num_kv_heads, params.block_size, params.head_dim = key_cache.shape
        params.sliding_window, params.scale = sliding_window or 0, scale
        params.dtype, params.cache_dtype = _DTYPES[query.dtype], _DTYPES[key_cache.dtype]
        self._attach_workspace(params, query)
        self.library.call("paged_attention", params)
        return out

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        self.check_copy(kv_pool, pairs)
        params = self._structs.copy_blocks
        params.pool, params.pairs, params.stream = kv_pool.data_ptr(), pairs.data_ptr(), self._stream()
        params.block_bytes = kv_pool.stride(0) * kv_pool.element_size()
        params.num_blocks, params.num_pairs = kv_pool.shape[0], pairs.shape[0]
        self.library.call("copy_blocks", params)

    def _use_metadata(self, metadata: AttentionMetadata, num_tokens: int) -> None:
        """Check the metadata and write it into both structs that carry it, unless they hold it already."""
        structs = self._structs
        if metadata is not structs.metadata:
            self.check_metadata(metadata)
            attention, rotate = structs.paged_attention, structs.rotate_and_cache
            attention.query_start_loc = metadata.query_start_loc.data_ptr()
            attention.seq_lens = metadata.seq_lens.data_ptr()
            attention.block_tables = metadata.block_tables.data_ptr()
            attention.block_table_stride = metadata.block_tables.stride(0)
            attention.num_seqs, attention.max_blocks = metadata.block_tables.shape
            attention.max_query_len, attention.max_seq_len = metadata.max_query_len, metadata.max_seq_len
            attention.num_tokens = rotate.num_tokens = metadata.slot_mapping.shape[0]
            rotate.positions, rotate.slot_mapping = metadata.positions.data_ptr(), metadata.slot_mapping.data_ptr()
            structs.metadata = metadata
        check_num_rows(metadata, num_tokens)


def _fill_view(view: abi.CacheView, cache: torch.Tensor) -> None:
    view.data = cache.data_ptr()
    view.block_stride, view.head_stride, view.slot_stride, _ = cache.stride()
