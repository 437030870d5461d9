"""Embeddings of tokens and of positions, and the head that turns hidden states into logits."""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.kernels.backend import KernelBackend
from engine.layers.weight import WeightTarget


class Embedding:
    """A table `[vocab_size, hidden_size]`, one row a token."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(input_ids, self.weight)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": WeightTarget.whole(self.weight)}


class PositionEmbedding:
    """A learned table `[offset + num_positions, hidden_size]`; position 0 is row `offset`."""

    def __init__(
        self, num_positions: int, offset: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty(offset + num_positions, hidden_size, dtype=dtype, device=device)
        self._rows = self.weight[offset:]

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """int64 `[T]`, each below num_positions → `[T, hidden_size]`."""
        return functional.embedding(positions, self._rows)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": WeightTarget.whole(self.weight)}


class LMHead:
    """Logits of the whole vocabulary; `tied_to` shares an embedding's table instead of holding one."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        tied_to: Embedding | None = None,
    ) -> None:
        self._kernels = kernels
        self.tied = tied_to is not None
        if tied_to is not None:
            self.weight = tied_to.weight
        else:
            self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden_size]` → float32 `[R, vocab_size]`."""
        return self._kernels.linear(hidden, self.weight, None).float()

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {} if self.tied else {f"{prefix}.weight": WeightTarget.whole(self.weight)}
