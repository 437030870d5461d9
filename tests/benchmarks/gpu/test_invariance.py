"""The check of batch invariance, on the CPU: it passes what is invariant, and finds what is not."""

from __future__ import annotations

import torch

from benchmarks.gpu.invariance import same_attention, same_logits
from engine.kernels.backend import AttentionMetadata
from engine.kernels.reference import ReferenceBackend

LENGTHS = ((1, 17), (1, 40), (6, 20), (3, 3))


class Invariant(ReferenceBackend):
    """Row by row in float64."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows = [(weight.double() * row.double()).sum(dim=1) for row in x]
        out = torch.stack(rows) if bias is None else torch.stack(rows) + bias.double()
        return out.to(x.dtype)

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        wide = super().paged_attention(
            query.double(), key_cache.double(), value_cache.double(), metadata, scale, sliding_window
        )
        return wide.to(query.dtype)


class OfTheBatch(Invariant):
    """Adds what depends on the batch's size."""

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None = None,
    ) -> torch.Tensor:
        out = super().paged_attention(query, key_cache, value_cache, metadata, scale, sliding_window)
        return out + len(metadata.seq_lens) * 1e-3


def test_attention() -> None:
    for kernels, share in ((Invariant(), 1.0), (OfTheBatch(), 0.0)):
        assert same_attention(kernels, LENGTHS, (4, 2), 16, "cpu", torch.bfloat16) == share


def test_logits() -> None:
    assert same_logits("tiny", Invariant(), (5, 1, 20), "cpu", torch.bfloat16) == 1.0
    assert same_logits("tiny", OfTheBatch(), (5, 1, 20), "cpu", torch.float32) < 1.0
