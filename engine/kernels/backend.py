"""The operations a decoder needs, as one interface over several implementations.

The KV pool is block-major: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, so that a block of all
layers is one contiguous run of bytes. Kernels see one layer of it as two strided views
`[num_blocks, num_kv_heads, block_size, head_dim]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class AttentionMetadata(NamedTuple):
    """Where each row of a mixed batch of decodes and prompt chunks stands in the KV cache.

    Sequence i owns the rows `query_start_loc[i] : query_start_loc[i + 1]`; they are its last tokens, so row j of them
    is at position `seq_lens[i] - num_rows + j`. A batch without sequences is never passed.

    Attributes:
        query_start_loc: int32 `[num_seqs + 1]`, first row of each sequence.
        seq_lens: int32 `[num_seqs]`, tokens in the cache once this step's are written.
        block_tables: int32 `[num_seqs, max_blocks]`; entries past a sequence's last block are undefined.
        slot_mapping: int64 `[num_tokens]`, `block * block_size + offset` of each row; -1 skips the write (padding).
        positions: int64 `[num_tokens]`, absolute position of each row.
        max_query_len: the longest run of rows of one sequence.
        max_seq_len: the largest of `seq_lens`.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    max_query_len: int
    max_seq_len: int


class KernelBackend(Protocol):
    """One implementation of the operations. All tensors of a call share device; floating ones share their type,
    except that the KV cache may have another type than the activations."""

    name: str

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + b` for x `[num_rows, in_features]`, W `[out_features, in_features]` and b `[out_features]`."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """`x / sqrt(mean(x²) + eps) * weight` over the last dimension. x: `[..., dim]`; a new tensor."""
        ...

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Add x into residual in place, then return RMSNorm of residual. Both `[num_tokens, dim]`."""
        ...

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        """`(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias` over the last dimension. x: `[num_tokens, dim]`; a
        new tensor."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` for `gate_up = [num_tokens, 2 * dim]`, gate first; returns `[num_tokens, dim]`."""
        ...

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
        """Rotate query and key in place (half-split, as Hugging Face) and write key and value to their slots.

        Args:
            query: `[num_tokens, num_heads, head_dim]`; strided along tokens (a view of the fused projection).
            key, value: `[num_tokens, num_kv_heads, head_dim]`, likewise.
            cos_sin: float32 `[max_positions, head_dim]`: cosines of the `head_dim / 2` angles, then the sines. None
                rotates nothing: query, key and `metadata.positions` are left alone.
        """
        ...

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of each row over its sequence's cached tokens (§4.1, Eq. 4), its own included.

        K and V are read back from the cache even for this step's own rows. Returns `[num_tokens, num_heads, head_dim]`,
        contiguous, in the query's type. A row sees the last `sliding_window` tokens up to itself, or all.
        """
        ...

    def copy_blocks(self, kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
        """Copy whole blocks (all layers) in order: int64 `pairs [n, 2]` of (source, destination) (§4.3)."""
        ...
