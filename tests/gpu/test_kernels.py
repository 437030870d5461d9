"""The CUDA kernels but attention, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.library import KernelError
from engine.kernels.reference import ReferenceBackend
from tests.engine.kernels.cases import assert_rounds_to, make_metadata, make_pool
from tests.gpu.conftest import Kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (1, 100, 576, 4096, 4097)  # whole packs of 16 bytes and not; fewer, as many and more than the threads of a CTA
EPS = 1e-5

reference = ReferenceBackend()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, weight = torch.randn(5, dim).to(dtype), torch.randn(dim).to(dtype)
    out = kernels.backend.rms_norm(x.to(kernels.device), weight.to(kernels.device), EPS).cpu()
    assert_rounds_to(out, reference.rms_norm(x.double(), weight.double(), EPS))


@pytest.mark.parametrize("head_dim", [24, 128])
def test_rms_norm_of_heads_inside_a_fused_projection(kernels: Kernels, head_dim: int) -> None:
    torch.manual_seed(0)
    fused, weight = torch.randn(5, 12, head_dim), torch.randn(head_dim)
    out = kernels.backend.rms_norm(fused.to(kernels.device)[:, 1:9], weight.to(kernels.device), EPS)
    assert out.is_contiguous()
    assert_rounds_to(out.cpu(), reference.rms_norm(fused[:, 1:9].double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_add_rms_norm(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    x, weight = torch.randn(5, dim).to(dtype), torch.randn(dim).to(dtype)
    residual = torch.randn(5, dim).to(dtype)
    expected = (residual.float() + x.float()).to(dtype)
    moved = residual.to(kernels.device, copy=True)
    out = kernels.backend.add_rms_norm(x.to(kernels.device), moved, weight.to(kernels.device), EPS)
    assert torch.equal(moved.cpu(), expected)
    assert_rounds_to(out.cpu(), reference.rms_norm(expected.double(), weight.double(), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_silu_and_mul(kernels: Kernels, dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    gate_up = (torch.randn(5, 2 * dim) * 8).to(dtype)
    out = kernels.backend.silu_and_mul(gate_up.to(kernels.device)).cpu()
    assert_rounds_to(out, reference.silu_and_mul(gate_up.double()))


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize(("head_dim", "block_size"), [(2, 1), (64, 16), (80, 256), (128, 8)])
def test_rotate_and_cache(
    kernels: Kernels, head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    torch.manual_seed(head_dim)
    metadata = make_metadata([(13, 13), (1, 40), (5, 33)], block_size, num_blocks=100)
    metadata.slot_mapping[4] = -1
    fused = torch.randn(len(metadata.positions), 9 + 3 + 3, head_dim).to(dtype)
    angles = torch.rand(64, head_dim // 2) * 6.0
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    pool = make_pool(100, 3, block_size, head_dim, cache_dtype).fill_(7.0)

    moved, moved_pool = fused.to(kernels.device, copy=True), pool.to(kernels.device, copy=True)
    kernels.backend.rotate_and_cache(
        moved[:, :9],
        moved[:, 9:12],
        moved[:, 12:],
        cos_sin.to(kernels.device),
        moved_pool[:, 1, 0],
        moved_pool[:, 1, 1],
        kernels.metadata(metadata),
    )

    query, key, value = torch.split(moved.cpu(), [9, 3, 3], dim=1)
    exact = fused.double()
    scratch = make_pool(100, 3, block_size, head_dim, torch.float64)
    reference.rotate_and_cache(
        exact[:, :9],
        exact[:, 9:12],
        exact[:, 12:],
        cos_sin.double(),
        scratch[:, 1, 0],
        scratch[:, 1, 1],
        metadata,
    )
    assert_rounds_to(torch.cat((query, key), dim=1), exact[:, :12])
    assert torch.equal(value, fused[:, 12:])
    # The cache holds the stored key and value exactly, and nothing else of the pool has changed.
    for token, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            pool[slot // block_size, 1, 0, :, slot % block_size] = key[token].to(cache_dtype)
            pool[slot // block_size, 1, 1, :, slot % block_size] = value[token].to(cache_dtype)
    assert torch.equal(moved_pool.cpu(), pool)


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (80, 1)])
def test_cache_without_rotation(
    kernels: Kernels, head_dim: int, block_size: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    """Query and key stay as they are, and no position is looked at."""
    torch.manual_seed(head_dim)
    metadata = make_metadata([(13, 13), (1, 40)], block_size, num_blocks=100)
    metadata.slot_mapping[4] = -1
    metadata.positions.fill_(1 << 40)
    fused = torch.randn(14, 4 + 2 + 2, head_dim).to(dtype)
    pool = make_pool(100, 2, block_size, head_dim, cache_dtype).fill_(7.0)
    moved, moved_pool = fused.to(kernels.device, copy=True), pool.to(kernels.device, copy=True)
    query, key, value = torch.split(moved, [4, 2, 2], dim=1)
    caches = moved_pool[:, 1, 0], moved_pool[:, 1, 1]
    kernels.backend.rotate_and_cache(query, key, value, None, *caches, kernels.metadata(metadata))
    query, key, value = torch.split(fused, [4, 2, 2], dim=1)
    reference.rotate_and_cache(query, key, value, None, pool[:, 1, 0], pool[:, 1, 1], metadata)
    assert torch.equal(moved.cpu(), fused)
    assert torch.equal(moved_pool.cpu(), pool)


@pytest.mark.parametrize("width", [129, 128, 127])  # bytes: 258 has words of 1, 256 of 16, 508 of 4
def test_copy_blocks_in_order(kernels: Kernels, width: int) -> None:
    """A chain copies what earlier pairs have written, within a batch of four pairs and across batches."""
    torch.manual_seed(0)
    dtype = torch.int32 if width == 127 else torch.int16
    expected = torch.randint(0, 1 << 14, (12, width), dtype=dtype)
    pool = expected.to(kernels.device, copy=True)
    pairs = torch.tensor([[0, 1], [1, 2], [3, 1], [4, 4], [2, 5], [6, 7], [8, 9], [10, 11], [7, 3], [5, 0], [0, 8]])
    reference.copy_blocks(expected, pairs)
    kernels.backend.copy_blocks(pool, pairs.to(kernels.device))
    assert torch.equal(pool.cpu(), expected)


def test_no_rows_are_no_work(kernels: Kernels) -> None:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=kernels.device)

    weight = torch.ones(8, device=kernels.device)
    assert kernels.backend.rms_norm(empty(0, 8), weight, EPS).shape == (0, 8)
    assert kernels.backend.add_rms_norm(empty(0, 8), empty(0, 8), weight, EPS).shape == (0, 8)
    assert kernels.backend.silu_and_mul(empty(0, 8)).shape == (0, 4)
    kernels.backend.copy_blocks(empty(2, 8), torch.empty(0, 2, dtype=torch.int64, device=kernels.device))


def test_refuses_rows_that_overlap(kernels: Kernels) -> None:
    x = torch.ones(2, 8, device=kernels.device)
    with pytest.raises(KernelError, match="residual_row_stride=0 is below dim=8"):
        kernels.backend.add_rms_norm(x, x[:1].expand(2, 8), x[0], EPS)


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    """Captured once, the kernels compute on whatever their inputs hold at a replay."""
    from engine.kernels.cuda import CudaBackend

    backend = CudaBackend()
    x, weight = torch.randn(4, 576, device="cuda"), torch.randn(576, device="cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        backend.rms_norm(x, weight, EPS)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.rms_norm(x, weight, EPS)
    x.copy_(torch.randn(4, 576))
    graph.replay()
    torch.cuda.synchronize()
    assert_rounds_to(out.cpu(), reference.rms_norm(x.cpu().double(), weight.cpu().double(), EPS))
