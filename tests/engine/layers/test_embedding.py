"""Learned positions: the table's rows, and its offset."""

from __future__ import annotations

import pytest
import torch

from engine.layers import PositionEmbedding


@pytest.mark.parametrize("offset", [0, 2])
def test_positions_start_at_the_offset(offset: int) -> None:
    embedding = PositionEmbedding(5, offset, 3, torch.float32, torch.device("cpu"))
    table = torch.arange(3.0 * (5 + offset)).view(-1, 3)
    target = embedding.weight_targets("wpe")["wpe.weight"]
    assert target.shape == (5 + offset, 3)
    target.load(table)
    positions = torch.tensor([4, 0, 2])
    assert torch.equal(embedding(positions), table[positions + offset])
