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
from engine.kernels.library import KernelError, KernelLibrary

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


class NativeBackend:
    """The operations of one library. A subclass names the device and may give a stream and a workspace.

    Args:
        library: a loaded kernel library.
        device_type: "cpu" or "cuda"; tensors anywhere else are refused.
        num_threads: threads of one call, the caller's included; 0 on CUDA.
        split_tokens: where attention cuts long sequences, as quire.h says; 0 on the CPU.

    Every method raises KernelError for tensors that do not fit.
    """

    name = "native"

    def __init__(self, library: KernelLibrary, device_type: str, num_threads: int, split_tokens: int = 0) -> None:
        self.library = library
        self._device_type = device_type
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
        dtype = self._check("x", x, x.dtype)
        dim = x.shape[-1]
        self._check_weight(weight, x)
        rows = x if x.dim() == 3 else x.reshape(-1, 1, dim)  # groups of rows keep the strides of a fused projection
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        params = self._structs.rms_norm
        params.x, params.weight, params.out = rows.data_ptr(), weight.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.x_row_stride, params.x_group_stride, _ = rows.stride()
        params.num_rows, params.num_groups, params.dim = rows.shape
        params.dtype, params.eps = dtype, eps
        self.library.call("rms_norm", params)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dtype = self._check("x", x, x.dtype, ndim=2)
        self._check("residual", residual, x.dtype, ndim=2)
        if residual.shape != x.shape:
            raise KernelError(f"residual has shape {list(residual.shape)}, x has {list(x.shape)}")
        self._check_weight(weight, x)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        params = self._structs.add_rms_norm
        params.x, params.residual = x.data_ptr(), residual.data_ptr()
        params.weight, params.out = weight.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.x_row_stride, params.residual_row_stride = x.stride(0), residual.stride(0)
        params.num_rows, params.dim = x.shape
        params.dtype, params.eps = dtype, eps
        self.library.call("add_rms_norm", params)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        dtype = self._check("gate_up", gate_up, gate_up.dtype, ndim=2)
        num_rows, width = gate_up.shape
        if width % 2:
            raise KernelError(f"gate_up has an odd last dimension, {width}")
        out = torch.empty((num_rows, width // 2), dtype=gate_up.dtype, device=gate_up.device)
        params = self._structs.silu_and_mul
        params.gate_up, params.out = gate_up.data_ptr(), out.data_ptr()
        params.stream = self._stream()
        params.gate_up_row_stride = gate_up.stride(0)
        params.num_rows, params.dim, params.dtype = num_rows, width // 2, dtype
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
        num_tokens, num_heads, head_dim = self._check_heads("query", query, query.dtype)
        if self._check_heads("key", key, query.dtype) != self._check_heads("value", value, query.dtype):
            raise KernelError(f"key has shape {list(key.shape)}, value has {list(value.shape)}")
        if key.shape[0] != num_tokens or key.shape[2] != head_dim:
            raise KernelError(f"key has shape {list(key.shape)}, query has {list(query.shape)}")
        if cos_sin is not None:
            self._check("cos_sin", cos_sin, torch.float32, ndim=2)
            if cos_sin.shape[1] != head_dim or not cos_sin.is_contiguous():
                raise KernelError(f"cos_sin must be contiguous [max_positions, {head_dim}], not {list(cos_sin.shape)}")
        self._check_caches(key_cache, value_cache, head_dim)
        if key_cache.shape[1] != key.shape[1]:
            raise KernelError(f"key has {key.shape[1]} heads, key_cache has {key_cache.shape[1]}")
        self._use_metadata(metadata, num_tokens)

        params = self._structs.rotate_and_cache
        params.query, params.key, params.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        params.cos_sin, params.max_positions = (None, 0) if cos_sin is None else (cos_sin.data_ptr(), cos_sin.shape[0])
        params.stream = self._stream()
        _fill_view(params.key_cache, key_cache)
        _fill_view(params.value_cache, value_cache)
        params.query_token_stride, params.query_head_stride, _ = query.stride()
        params.key_token_stride, params.key_head_stride, _ = key.stride()
        params.value_token_stride, params.value_head_stride, _ = value.stride()
        params.num_heads = num_heads
        params.num_blocks, params.num_kv_heads, params.block_size, params.head_dim = key_cache.shape
        params.dtype, params.cache_dtype = _DTYPES[query.dtype], _dtype_code("key_cache", key_cache.dtype)
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
        num_tokens, num_heads, head_dim = self._check_heads("query", query, query.dtype)
        self._check_caches(key_cache, value_cache, head_dim)
        if sliding_window is not None and sliding_window < 1:
            raise KernelError(f"sliding_window={sliding_window} must be at least 1, or None")
        self._use_metadata(metadata, num_tokens)

        out = torch.empty((num_tokens, num_heads, head_dim), dtype=query.dtype, device=query.device)
        params = self._structs.paged_attention
        params.query, params.out, params.stream = query.data_ptr(), out.data_ptr(), self._stream()
        _fill_view(params.key_cache, key_cache)
        _fill_view(params.value_cache, value_cache)
        params.query_token_stride, params.query_head_stride, _ = query.stride()
        params.num_heads = num_heads
        params.num_blocks, params.num_kv_heads, params.block_size, params.head_dim = key_cache.shape
        params.sliding_window, params.scale = sliding_window or 0, scale
        params.dtype, params.cache_dtype = _DTYPES[query.dtype], _dtype_code("key_cache", key_cache.dtype)
        self._attach_workspace(params, query)
        self.library.call("paged_attention", params)
        return out

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        self._check_device("kv_pool", kv_pool)
        self._check("pairs", pairs, torch.int64, ndim=2)
        if not kv_pool.is_contiguous() or kv_pool.dim() < 1:
            raise KernelError("kv_pool must be contiguous, blocks first")
        if pairs.shape[1] != 2 or not pairs.is_contiguous():
            raise KernelError(f"pairs must be contiguous [n, 2], not {list(pairs.shape)}")
        params = self._structs.copy_blocks
        params.pool, params.pairs, params.stream = kv_pool.data_ptr(), pairs.data_ptr(), self._stream()
        params.block_bytes = kv_pool.stride(0) * kv_pool.element_size()
        params.num_blocks, params.num_pairs = kv_pool.shape[0], pairs.shape[0]
        self.library.call("copy_blocks", params)

    def _check_device(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device_type:
            raise KernelError(f"{what} is on {tensor.device}, the {self.name} kernels need {self._device_type}")

    def _check(self, what: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int | None = None) -> int:
        """Device, type, rank and a contiguous last dimension; returns the ABI's code of a floating type, or -1."""
        self._check_device(what, tensor)
        if tensor.dtype != dtype:
            raise KernelError(f"{what} is {tensor.dtype}, expected {dtype}")
        if tensor.dim() != ndim if ndim is not None else tensor.dim() < 1:
            raise KernelError(f"{what} has shape {list(tensor.shape)}, expected {ndim or 'at least 1'} dimensions")
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise KernelError(f"{what} has stride {tensor.stride(-1)} along its last dimension, expected 1")
        return _dtype_code(what, dtype) if dtype.is_floating_point else -1

    def _check_weight(self, weight: torch.Tensor, x: torch.Tensor) -> None:
        self._check("weight", weight, x.dtype, ndim=1)
        if weight.shape[0] != x.shape[-1]:
            raise KernelError(f"weight has {weight.shape[0]} elements, x has rows of {x.shape[-1]}")

    def _check_heads(self, what: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Size:
        self._check(what, tensor, dtype, ndim=3)
        return tensor.shape

    def _check_caches(self, key_cache: torch.Tensor, value_cache: torch.Tensor, head_dim: int) -> None:
        self._check("key_cache", key_cache, key_cache.dtype, ndim=4)
        self._check("value_cache", value_cache, key_cache.dtype, ndim=4)
        if key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
            raise KernelError(
                f"key_cache has shape {list(key_cache.shape)} and value_cache {list(value_cache.shape)}; "
                f"both must be [num_blocks, num_kv_heads, block_size, {head_dim}]"
            )

    def _use_metadata(self, metadata: AttentionMetadata, num_tokens: int) -> None:
        """Check the metadata and write it into both structs that carry it, unless they hold it already."""
        structs = self._structs
        if metadata is not structs.metadata:
            self._check_metadata(metadata)
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
        if metadata.slot_mapping.shape[0] != num_tokens:
            raise KernelError(f"query has {num_tokens} rows, slot_mapping has {metadata.slot_mapping.shape[0]}")

    def _check_metadata(self, metadata: AttentionMetadata) -> None:
        for field, dtype, ndim in (
            ("query_start_loc", torch.int32, 1),
            ("seq_lens", torch.int32, 1),
            ("block_tables", torch.int32, 2),
            ("slot_mapping", torch.int64, 1),
            ("positions", torch.int64, 1),
        ):
            self._check(field, getattr(metadata, field), dtype, ndim)
        num_seqs = metadata.seq_lens.shape[0]
        if metadata.query_start_loc.shape[0] != num_seqs + 1 or metadata.block_tables.shape[0] != num_seqs:
            raise KernelError(
                f"seq_lens has {num_seqs} sequences, query_start_loc {metadata.query_start_loc.shape[0]} entries "
                f"(one more is right) and block_tables {metadata.block_tables.shape[0]} rows"
            )
        if metadata.positions.shape != metadata.slot_mapping.shape:
            raise KernelError(
                f"positions has {metadata.positions.shape[0]} rows, slot_mapping {metadata.slot_mapping.shape[0]}"
            )


def _dtype_code(what: str, dtype: torch.dtype) -> int:
    code = _DTYPES.get(dtype)
    if code is None:
        raise KernelError(f"{what} is {dtype}; the kernels take {', '.join(str(known) for known in _DTYPES)}")
    return code


def _fill_view(view: abi.CacheView, cache: torch.Tensor) -> None:
    view.data = cache.data_ptr()
    view.block_stride, view.head_stride, view.slot_stride, _ = cache.stride()
