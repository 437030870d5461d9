"""The Triton kernels but attention and products, in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from engine.kernels.reference import ReferenceBackend
from tests.engine.kernels.cases import assert_rounds_to, make_metadata, make_pool
from tests.engine.kernels.triton.interpreter import InterpretedBackend

DTYPES = (torch.float32, torch.float16)
DIMS = (1, 100, 576, 4097)
EPS = 1e-5

reference = ReferenceBackend()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_norms(triton: InterpretedBackend, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, residual, weight = torch.randn(3, dim).to(dtype), torch.randn(3, dim).to(dtype), torch.randn(dim).to(dtype)
    assert_rounds_to(triton.rms_norm(x, weight, EPS), reference.rms_norm(x.double(), weight.double(), EPS))
    expected = (residual.float() + x.float()).to(dtype)
    out = triton.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected)
    assert_rounds_to(out, reference.rms_norm(expected.double(), weight.double(), EPS))


def test_rms_norm_of_heads_inside_a_fused_projection(triton: InterpretedBackend) -> None:
    torch.manual_seed(0)
    heads, weight = torch.randn(5, 12, 24)[:, 1:9], torch.randn(24)
    out = triton.rms_norm(heads, weight, EPS)
    assert out.is_contiguous()
    assert_rounds_to(out, reference.rms_norm(heads.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_layer_norm(triton: InterpretedBackend, dim: int, dtype: torch.dtype) -> None:
    """Also of rows far from zero, whose variance is small beside their mean."""
    torch.manual_seed(dim)
    x = (torch.randn(3, dim) + torch.tensor([[0.0], [3.0], [100.0]])).to(dtype)
    weight, bias = torch.randn(dim).to(dtype), torch.randn(dim).to(dtype)
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    assert_rounds_to(triton.layer_norm(x, weight, bias, EPS), exact, slack=1e-4)


def test_layer_norm_refuses_vectors_of_another_length(triton: InterpretedBackend) -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.raises(KernelError, match="bias has 7 elements, x has rows of 8"):
        triton.layer_norm(x, weight, torch.randn(7), EPS)


def test_a_row_is_normed_bitwise_the_same_alone_and_in_a_batch(invariant: InterpretedBackend) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 576), torch.randn(576), torch.randn(576)
    whole, centered = invariant.rms_norm(x, weight, EPS), invariant.layer_norm(x, weight, bias, EPS)
    for row in (slice(row, row + 1) for row in range(9)):
        assert torch.equal(invariant.rms_norm(x[row], weight, EPS), whole[row])
        assert torch.equal(invariant.layer_norm(x[row], weight, bias, EPS), centered[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_silu_and_mul(triton: InterpretedBackend, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    gate_up = (torch.randn(3, 2 * dim) * 8).to(dtype)
    assert_rounds_to(triton.silu_and_mul(gate_up), reference.silu_and_mul(gate_up.double()))


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("dtype", "cache_dtype"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize(("head_dim", "block_size", "heads"), [(2, 1, (9, 3)), (80, 16, (4, 2)), (64, 256, (2, 2))])
def test_rotate_and_cache(
    triton: InterpretedBackend,
    head_dim: int,
    block_size: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    rotate: bool,
) -> None:
    torch.manual_seed(head_dim)
    metadata = make_metadata([(5, 5), (1, 40), (3, 33)], block_size, num_blocks=100)
    metadata.slot_mapping[4] = -1
    if not rotate:
        metadata.positions.fill_(1 << 40)
    num_heads, num_kv_heads = heads
    counts = [num_heads, num_kv_heads, num_kv_heads]
    fused = torch.randn(len(metadata.positions), sum(counts), head_dim).to(dtype)
    angles = torch.rand(64, head_dim // 2) * 6.0
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1) if rotate else None
    pool = make_pool(100, num_kv_heads, block_size, head_dim, cache_dtype).fill_(7.0)
    expected_pool, exact = pool.clone(), fused.double()
    scratch = make_pool(100, num_kv_heads, block_size, head_dim, torch.float64)
    exact_query, exact_key, exact_value = torch.split(exact, counts, dim=1)
    reference.rotate_and_cache(
        exact_query,
        exact_key,
        exact_value,
        None if cos_sin is None else cos_sin.double(),
        scratch[:, 1, 0],
        scratch[:, 1, 1],
        metadata,
    )

    query, key, value = torch.split(fused, counts, dim=1)
    triton.rotate_and_cache(query, key, value, cos_sin, pool[:, 1, 0], pool[:, 1, 1], metadata)
    assert_rounds_to(fused, exact)
    # The cache holds the stored key and value exactly, and nothing else of the pool has changed.
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            expected_pool[slot // block_size, 1, 0, :, slot % block_size] = key[token].to(cache_dtype)
            expected_pool[slot // block_size, 1, 1, :, slot % block_size] = value[token].to(cache_dtype)
    assert torch.equal(pool, expected_pool)


@pytest.mark.parametrize("width", [129, 128, 127])  # bytes: 258 has words of 2, 256 of 8, 508 of 4
def test_copy_blocks_in_order(triton: InterpretedBackend, width: int) -> None:
    torch.manual_seed(0)
    dtype = torch.int32 if width == 127 else torch.int16
    pool = torch.randint(0, 1 << 14, (6, 5, width), dtype=dtype)
    expected = pool.clone()
    pairs = torch.tensor([[0, 1], [1, 2], [3, 1], [4, 4], [2, 5]])
    reference.copy_blocks(expected, pairs)
    triton.copy_blocks(pool, pairs)
    assert torch.equal(pool, expected)


def test_no_rows_are_no_work(triton: InterpretedBackend) -> None:
    weight = torch.ones(8)
    assert triton.rms_norm(torch.empty(0, 8), weight, EPS).shape == (0, 8)
    assert triton.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), weight, EPS).shape == (0, 8)
    assert triton.silu_and_mul(torch.empty(0, 8)).shape == (0, 4)
    triton.copy_blocks(torch.empty(2, 8), torch.empty(0, 2, dtype=torch.int64))


def test_refuses_what_does_not_fit(triton: InterpretedBackend) -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(KernelError, match="weight has 7 elements, x has rows of 8"):
        triton.rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(KernelError, match="x is on meta, the triton kernels need cpu"):
        triton.rms_norm(x.to("meta"), weight, EPS)
    with pytest.raises(KernelError, match="residual_row_stride=0 is below dim=8"):
        triton.add_rms_norm(x, x[:1].expand(2, 8), weight, EPS)
    with pytest.raises(KernelError, match="x has rows of 65537; the Triton norms take up to 65536"):
        triton.rms_norm(torch.ones(1, 65537), torch.ones(65537), EPS)
    metadata, pool = make_metadata([(3, 3)], 16, num_blocks=2), torch.zeros(2, 1, 2, 2, 16, 5)
    heads = torch.ones(3, 2, 5)
    with pytest.raises(KernelError, match="head_dim=5 must be even"):
        triton.rotate_and_cache(heads, heads, heads, None, pool[:, 0, 0], pool[:, 0, 1], metadata)
