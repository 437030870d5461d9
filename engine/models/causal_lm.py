"""What every model offers to the ModelRunner and to the loader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from engine.kernels.backend import AttentionMetadata
from engine.layers import Linear, WeightTarget
from engine.model_config import ModelConfig


class CausalLM(Protocol):
    """A decoder over the paged KV cache."""

    config: ModelConfig
    base_model_prefix: str
    """What names in `weight_targets` and `unused_weights` begin with, but for the head's; checkpoints may omit it."""

    @property
    def unused_weights(self) -> frozenset[str]:
        """Checkpoint tensors that this configuration has no use for, such as the head of a tied model."""
        ...

    def forward(self, input_ids: torch.Tensor, kv_pool: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Hidden states after the final norm, `[T, hidden_size]`; K and V of the T tokens go to the pool.

        Args:
            input_ids: int64 `[T]`, the batch's tokens, sequence after sequence.
            kv_pool: `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, of this rank's KV heads.
        """
        ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 `[R, vocab_size]` for the R rows of `hidden` that want them."""
        ...

    def adaptable_linears(self) -> Iterator[tuple[tuple[str, ...], Linear]]:
        """The layers that adapters add to: each with a key a projection, as `decoder_weights` names matrices."""
        ...

    def weight_targets(self) -> dict[str, WeightTarget]:
        """Where each checkpoint tensor goes, by its Hugging Face name."""
        ...
