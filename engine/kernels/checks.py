"""What every launch wrapper checks of the tensors it is given: device, type, shape and stride."""

from __future__ import annotations

import torch

from engine.kernels.backend import AttentionMetadata
from engine.kernels.library import KernelError

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_METADATA = (
    ("query_start_loc", torch.int32, 1),
    ("seq_lens", torch.int32, 1),
    ("block_tables", torch.int32, 2),
    ("slot_mapping", torch.int64, 1),
    ("positions", torch.int64, 1),
)


class TensorChecks:
    """Base of the backends that hand pointers to kernels. Each check raises KernelError with the tensor's name.

    Args:
        device: tensors anywhere else are refused.
    """

    name = "native"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def check_device(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.device != self.device:
            raise KernelError(f"{what} is on {tensor.device}, the {self.name} kernels need {self.device}")

    def check(self, what: str, tensor: torch.Tensor, dtype: torch.dtype, ndim: int | None = None) -> None:
        """Device, type, rank and a contiguous last dimension."""
        self.check_device(what, tensor)
        if tensor.dtype != dtype:
            raise KernelError(f"{what} is {tensor.dtype}, expected {dtype}")
        if tensor.dim() != ndim if ndim is not None else tensor.dim() < 1:
            raise KernelError(f"{what} has shape {list(tensor.shape)}, expected {ndim or 'at least 1'} dimensions")
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise KernelError(f"{what} has stride {tensor.stride(-1)} along its last dimension, expected 1")
        if dtype.is_floating_point and dtype not in FLOATING:
            raise KernelError(f"{what} is {dtype}; the kernels take {', '.join(str(known) for known in FLOATING)}")

    def check_linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.check("x", x, x.dtype, ndim=2)
        self.check("weight", weight, x.dtype, ndim=2)
        if weight.shape[1] != x.shape[1] or not weight.is_contiguous():
            raise KernelError(f"weight must be contiguous [out_features, {x.shape[1]}], not {list(weight.shape)}")
        if bias is not None:
            self.check("bias", bias, x.dtype, ndim=1)
            if bias.shape[0] != weight.shape[0]:
                raise KernelError(f"bias has {bias.shape[0]} elements, weight has {weight.shape[0]} rows")

    def check_norm(self, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        self.check("x", x, x.dtype, None if residual is None else 2)
        if residual is not None:
            self.check("residual", residual, x.dtype, ndim=2)
            if residual.shape != x.shape:
                raise KernelError(f"residual has shape {list(residual.shape)}, x has {list(x.shape)}")
            if len(residual) > 1 and residual.stride(0) < residual.shape[1]:
                raise KernelError(f"residual_row_stride={residual.stride(0)} is below dim={residual.shape[1]}")
        self.check("weight", weight, x.dtype, ndim=1)
        if weight.shape[0] != x.shape[-1]:
            raise KernelError(f"weight has {weight.shape[0]} elements, x has rows of {x.shape[-1]}")

    def check_gate_up(self, gate_up: torch.Tensor) -> None:
        self.check("gate_up", gate_up, gate_up.dtype, ndim=2)
        if gate_up.shape[1] % 2:
            raise KernelError(f"gate_up has an odd last dimension, {gate_up.shape[1]}")

    def check_rotation(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos_sin: torch.Tensor | None,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> None:
        for what, heads in (("query", query), ("key", key), ("value", value)):
            self.check(what, heads, query.dtype, ndim=3)
        num_tokens, _, head_dim = query.shape
        if key.shape != value.shape:
            raise KernelError(f"key has shape {list(key.shape)}, value has {list(value.shape)}")
        if key.shape[0] != num_tokens or key.shape[2] != head_dim:
            raise KernelError(f"key has shape {list(key.shape)}, query has {list(query.shape)}")
        if cos_sin is not None:
            self.check("cos_sin", cos_sin, torch.float32, ndim=2)
            if cos_sin.shape[1] != head_dim or not cos_sin.is_contiguous():
                raise KernelError(f"cos_sin must be contiguous [max_positions, {head_dim}], not {list(cos_sin.shape)}")
        self.check_caches(key_cache, value_cache, head_dim)
        if key_cache.shape[1] != key.shape[1]:
            raise KernelError(f"key has {key.shape[1]} heads, key_cache has {key_cache.shape[1]}")

    def check_attention(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, sliding_window: int | None
    ) -> None:
        self.check("query", query, query.dtype, ndim=3)
        self.check_caches(key_cache, value_cache, query.shape[2])
        if sliding_window is not None and sliding_window < 1:
            raise KernelError(f"sliding_window={sliding_window} must be at least 1, or None")

    def check_caches(self, key_cache: torch.Tensor, value_cache: torch.Tensor, head_dim: int) -> None:
        self.check("key_cache", key_cache, key_cache.dtype, ndim=4)
        self.check("value_cache", value_cache, key_cache.dtype, ndim=4)
        if key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
            raise KernelError(
                f"key_cache has shape {list(key_cache.shape)} and value_cache {list(value_cache.shape)}; "
                f"both must be [num_blocks, num_kv_heads, block_size, {head_dim}]"
            )

    def check_groups(self, query: torch.Tensor, key_cache: torch.Tensor) -> None:
        num_heads, num_kv_heads = query.shape[1], key_cache.shape[1]
        if num_heads == 0 or num_heads % num_kv_heads:
            raise KernelError(f"num_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")

    def check_copy(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        self.check_device("kv_pool", kv_pool)
        self.check("pairs", pairs, torch.int64, ndim=2)
        if not kv_pool.is_contiguous() or kv_pool.dim() < 1:
            raise KernelError("kv_pool must be contiguous, blocks first")
        if pairs.shape[1] != 2 or not pairs.is_contiguous():
            raise KernelError(f"pairs must be contiguous [n, 2], not {list(pairs.shape)}")

    def check_metadata(self, metadata: AttentionMetadata) -> None:
        for field, dtype, ndim in _METADATA:
            self.check(field, getattr(metadata, field), dtype, ndim)
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


def check_num_rows(metadata: AttentionMetadata, num_tokens: int) -> None:
    """The metadata belongs to a batch of as many rows as the query has."""
    if metadata.slot_mapping.shape[0] != num_tokens:
        raise KernelError(f"query has {num_tokens} rows, slot_mapping has {metadata.slot_mapping.shape[0]}")
