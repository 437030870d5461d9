"""The vocabulary split over ranks: each holds some tokens' rows of the embedding and of the head."""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.kernels.backend import KernelBackend
from engine.layers.embedding import Embedding, LMHead
from engine.layers.weight import WeightTarget
from engine.parallel.rank import Rank


class VocabParallelEmbedding(Embedding):
    """Rows of this rank's tokens; a token that another rank has is zeros here, and all are summed."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, rank: Rank) -> None:
        super().__init__(len(rank.shard.vocab), hidden_size, dtype, device)
        self._vocab_size, self._rank = vocab_size, rank

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        shard, communicator = self._rank
        if communicator is None:
            return super().__call__(input_ids)
        rows = input_ids - shard.vocab.start
        elsewhere = (rows < 0) | (rows >= len(shard.vocab))
        embedded = super().__call__(rows.masked_fill_(elsewhere, 0)).masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        communicator.all_reduce(embedded)
        return embedded

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        target = WeightTarget.sharded(self.weight, self._vocab_size, 0, self._rank.shard.vocab)
        return {f"{prefix}.weight": target}


class ParallelLMHead(LMHead):
    """Logits of this rank's tokens, gathered from all ranks, which pad theirs to the largest part."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        rank: Rank,
        tied_to: Embedding | None = None,
    ) -> None:
        super().__init__(len(rank.shard.vocab), hidden_size, kernels, dtype, device, tied_to)
        self._vocab_size, self._rank = vocab_size, rank

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden_size]` → float32 `[R, vocab_size]`, on every rank."""
        shard, communicator = self._rank
        logits = super().__call__(hidden)
        if communicator is None:
            return logits
        parts = communicator.all_gather(functional.pad(logits, (0, shard.vocab_padded - len(shard.vocab))))
        sizes = [len(vocab) for vocab in shard.vocabs]
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        if self.tied:
            return {}
        target = WeightTarget.sharded(self.weight, self._vocab_size, 0, self._rank.shard.vocab)
        return {f"{prefix}.weight": target}
