"""The reference against definitions written another way: it is what all other backends are measured with."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels.reference import ReferenceBackend
from tests.engine.kernels.cases import MIXED, make_batch, make_metadata

reference = ReferenceBackend()


def test_norms_and_activation_against_torch() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    torch.testing.assert_close(
        reference.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (24,), weight, 1e-5)
    )
    total = x + residual
    out = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(total, (24,), weight, 1e-5))
    torch.testing.assert_close(reference.silu_and_mul(x), x[:, :12] * x[:, :12].sigmoid() * x[:, 12:])


def test_rotation_is_by_the_angle_of_the_position() -> None:
    """Half-split pairs are complex numbers, turned by e^(i * angle)."""
    torch.manual_seed(0)
    metadata = make_metadata([(4, 10)], block_size=4, num_blocks=5)
    angles = torch.arange(10)[:, None] * torch.tensor([1.0, 0.1, 0.01])
    query, key, value = torch.randn(4, 2, 6), torch.randn(4, 1, 6), torch.randn(4, 1, 6)
    turned = torch.complex(query[..., :3], query[..., 3:]) * torch.polar(torch.ones(4, 1, 3), angles[6:, None])
    pool = torch.zeros(5, 2, 1, 4, 6)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    reference.rotate_and_cache(query, key, value, cos_sin, pool[:, 0], pool[:, 1], metadata)
    torch.testing.assert_close(query, torch.cat((turned.real, turned.imag), dim=-1))
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        assert torch.equal(pool[slot // 4, 0, :, slot % 4], key[token])
        assert torch.equal(pool[slot // 4, 1, :, slot % 4], value[token])
    assert pool.count_nonzero() == 2 * 4 * 6


def test_without_a_table_key_and_value_are_cached_as_they_are() -> None:
    torch.manual_seed(0)
    metadata = make_metadata([(4, 10)], block_size=4, num_blocks=5)
    metadata.slot_mapping[2] = -1
    query, key, value = (torch.randn(4, 1, 6) for _ in range(3))
    before = query.clone(), key.clone()
    pool = torch.zeros(5, 2, 1, 4, 6)
    reference.rotate_and_cache(query, key, value, None, pool[:, 0], pool[:, 1], metadata)
    assert torch.equal(query, before[0])
    assert torch.equal(key, before[1])
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            assert torch.equal(pool[slot // 4, 0, :, slot % 4], key[token])
            assert torch.equal(pool[slot // 4, 1, :, slot % 4], value[token])
    assert pool.count_nonzero() == 2 * 3 * 6


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_attention_one_row_and_head_at_a_time(sliding_window: int | None) -> None:
    lengths = ((3, 9), (1, 6))
    batch = make_batch(lengths, heads=(4, 2), head_dim=8, block_size=4)
    out = reference.paged_attention(
        batch.query, batch.key_cache, batch.value_cache, batch.metadata, batch.scale, sliding_window
    )
    row = 0
    for seq, (num_rows, seq_len) in enumerate(lengths):
        for position in range(seq_len - num_rows, seq_len):
            for head in range(4):
                weights, total = [], torch.zeros(8)
                oldest = 0 if sliding_window is None else max(0, position - sliding_window + 1)
                for past in range(oldest, position + 1):
                    block = int(batch.metadata.block_tables[seq, past // 4])
                    key = batch.key_cache[block, head // 2, past % 4]
                    weights.append(math.exp(float(batch.query[row, head] @ key) * batch.scale))
                    total += weights[-1] * batch.value_cache[block, head // 2, past % 4]
                torch.testing.assert_close(out[row, head], total / sum(weights))
            row += 1


def test_attention_is_causal_scaled_dot_product_attention() -> None:
    batch = make_batch(MIXED, heads=(4, 4), block_size=8)
    exact = batch.exact()
    starts = batch.metadata.query_start_loc.tolist()
    for seq, (num_rows, seq_len) in enumerate(MIXED):
        position = torch.arange(seq_len)
        block = batch.metadata.block_tables[seq][position // 8].long()
        keys, values = (cache[block, :, position % 8].double() for cache in (batch.key_cache, batch.value_cache))
        mask = torch.ones(num_rows, seq_len, dtype=torch.bool).tril(seq_len - num_rows)
        expected = torch.nn.functional.scaled_dot_product_attention(
            batch.query[starts[seq] : starts[seq + 1]].double().transpose(0, 1),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            mask,
        )
        torch.testing.assert_close(exact[starts[seq] : starts[seq + 1]], expected.transpose(0, 1))
