"""Blocks moved between the device's pool and the host's, by both methods."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import cuda_abi
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.kernels.library import KernelError
from tests.gpu.conftest import Kernels

METHODS = [cuda_abi.SWAP_COPY_ENGINE, cuda_abi.SWAP_KERNEL, None]


def only_of(kernels: Kernels) -> CudaOnlyKernels:
    if kernels.device == "cpu":
        return CudaOnlyKernels(kernels.native.library, lambda: 1)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return CudaOnlyKernels(kernels.native.library, lambda: stream.cuda_stream)


def pinned(tensor: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    return tensor if kernels.device == "cpu" else tensor.pin_memory()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [4, 3000, 16384])  # bytes: 12 and 12,000 in words of 1 and 16; 64 KiB
def test_a_round_trip_keeps_every_byte(kernels: Kernels, width: int, method: int | None) -> None:
    torch.manual_seed(width)
    only = only_of(kernels)
    expected = torch.randint(0, 1 << 30, (70, width if width != 4 else 3), dtype=torch.int32)
    pool = expected.to(kernels.device, copy=True)
    host = pinned(torch.zeros(90, pool.shape[1], dtype=torch.int32), kernels)
    out = pinned(torch.stack((torch.randperm(70)[:66], torch.randperm(90)[:66]), dim=1).contiguous(), kernels)
    only.swap_blocks(pool, host, out, to_host=True, method=method)
    if kernels.device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host[out[:, 1]], expected[out[:, 0]])
    untouched = torch.ones(90, dtype=torch.bool)
    untouched[out[:, 1]] = False
    assert not host[untouched].any(), "a block that was not named has changed"

    pool.zero_()
    back = pinned(out.flip(1).contiguous(), kernels)
    only.swap_blocks(pool, host, back, to_host=False, method=method)
    if kernels.device == "cuda":
        torch.cuda.synchronize()
    moved = pool.cpu()
    assert torch.equal(moved[out[:, 0]], expected[out[:, 0]])
    assert int((moved != 0).any(dim=1).sum()) == 66


def test_refuses_what_does_not_fit(kernels: Kernels) -> None:
    only = only_of(kernels)
    pool = torch.zeros(4, 8, device=kernels.device)
    host = pinned(torch.zeros(2, 8), kernels)
    for pairs, to_host, message in (
        ([[4, 0]], True, r"pair 0 is \(4, 0\); the pools have 4 and 2"),
        ([[0, 0], [1, 2]], True, r"pair 1 is \(1, 2\)"),
        ([[2, 0]], False, r"pair 0 is \(2, 0\); the pools have 2 and 4"),
        ([[-1, 0]], False, r"\(-1, 0\)"),
    ):
        with pytest.raises(KernelError, match=message):
            only.swap_blocks(pool, host, torch.tensor(pairs), to_host=to_host)
    with pytest.raises(KernelError, match="differ"):
        only.swap_blocks(pool, torch.zeros(2, 9), torch.zeros(1, 2, dtype=torch.int64), to_host=True)
    with pytest.raises(KernelError, match="stream is null"):
        CudaOnlyKernels(kernels.native.library, lambda: None).swap_blocks(
            pool, host, torch.zeros(1, 2, dtype=torch.int64), to_host=True
        )
