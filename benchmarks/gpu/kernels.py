"""Times of Quire's kernels, and of peers on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.attention import CASES, AttentionCase, AttentionData, attend, make_data
from benchmarks.gpu.checks import TOLERANCE, relative_error
from benchmarks.gpu.figures import FIXED_SPLIT
from benchmarks.gpu.peers import PEERS, SLOW_TO_COMPILE, PeerMissingError
from benchmarks.gpu.results import Missing, Timing
from benchmarks.gpu.timer import event_seconds, graph_seconds
from engine.kernels import cuda_abi
from engine.kernels.backend import KernelBackend
from engine.kernels.cuda_only import CudaOnlyKernels

_ROTATED_BYTES = 256 << 20  # several times the L2 cache


def time_attention(
    kernels: KernelBackend, cases: tuple[AttentionCase, ...] = CASES, fixed_splits: KernelBackend | None = None
) -> Iterator[Timing | Missing]:
    """Ours takes one layer after another of the pool of all layers, peers two layers in their own layout.

    Args:
        fixed_splits: kernels whose splits do not depend on the batch, to be timed too.
    """
    for case in cases:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if case.pool_bytes > 0.7 * free:
            yield Missing(case.name, "quire", f"its pool takes {case.pool_bytes >> 30} GiB")
            continue
        data = make_data(case)
        yield _time_ours(case.name, kernels, data)
        if fixed_splits is not None and case.has_peers:
            yield _time_ours(case.name + FIXED_SPLIT, fixed_splits, data)
        if case.has_peers:
            yield from _time_peers(kernels, data)
        del data


def _time_ours(name: str, kernels: KernelBackend, data: AttentionData) -> Timing | Missing:
    case = data.case
    try:
        seconds = graph_seconds([partial(attend, kernels, data, index) for index in range(case.num_layers)])
    except Exception as error:  # one case's failure leaves the others
        return Missing(name, "quire", f"fails: {type(error).__name__}: {error}".splitlines()[0][:160])
    return Timing(name, "quire", seconds, case.kv_bytes, case.flops if case.num_rows > 1 else 0)


def _time_peers(kernels: KernelBackend, data: AttentionData) -> Iterator[Timing | Missing]:
    case = data.case
    expected = attend(kernels, data, 0)
    for name, peer in PEERS.items():
        if name in SLOW_TO_COMPILE and not case.compiles_peers:
            continue
        try:
            theirs = peer(data)
            error = relative_error(theirs[0](), expected)
            if not error <= 2 * TOLERANCE:
                raise PeerMissingError(f"computes something else: error {error:.2g}")
            yield Timing(case.name, name, graph_seconds(theirs), case.kv_bytes, case.flops if case.num_rows > 1 else 0)
        except Exception as reason:  # whatever a peer does, the visit goes on
            text = str(reason) if isinstance(reason, PeerMissingError) else f"fails: {type(reason).__name__}: {reason}"
            yield Missing(case.name, name, text.splitlines()[0][:120])
        torch.cuda.synchronize()


def time_dense(kernels: KernelBackend) -> Iterator[Timing]:
    """Norms and activations of Llama-8B, over more rows than the L2 cache holds."""
    for num_rows in (64, 2048):
        yield from _time_rows(kernels, num_rows)


def _time_rows(kernels: KernelBackend, num_rows: int) -> Iterator[Timing]:
    weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    num_bytes = 2 * num_rows * 4096
    copies = max(2, -(-_ROTATED_BYTES // num_bytes))
    xs = torch.randn(copies, num_rows, 4096, device="cuda", dtype=torch.bfloat16)
    residuals = torch.randn_like(xs)
    calls = [partial(kernels.rms_norm, x, weight, 1e-5) for x in xs]
    yield Timing(f"rms_norm {num_rows} x 4096", "quire", graph_seconds(calls), 2 * num_bytes)
    calls = [
        partial(kernels.add_rms_norm, x, residual, weight, 1e-5) for x, residual in zip(xs, residuals, strict=True)
    ]
    yield Timing(f"add_rms_norm {num_rows} x 4096", "quire", graph_seconds(calls), 4 * num_bytes)
    gate_ups = torch.randn(max(2, copies // 7), num_rows, 2 * 14336, device="cuda", dtype=torch.bfloat16)
    activations = [partial(kernels.silu_and_mul, gate_up) for gate_up in gate_ups]
    yield Timing(f"silu_and_mul {num_rows} x 14336", "quire", graph_seconds(activations), 6 * num_rows * 14336)


def time_sampling(cuda_only: CudaOnlyKernels) -> Iterator[Timing]:
    """256 tokens of a vocabulary of 128,256; the logits are read once at least."""
    num_draws, vocab_size = 256, 128256
    logits = torch.randn(num_draws, vocab_size, device="cuda") * 3
    drawn = torch.zeros((num_draws, cuda_abi.DRAWN.itemsize), dtype=torch.uint8, device="cuda")
    for name, sharpness, top_p in (("greedy", 0.0, 1.0), ("temperature", 1.0, 1.0), ("top-p", 1.0, 0.95)):
        table = np.zeros(num_draws, dtype=cuda_abi.DRAW)
        table["seed"] = table["row"] = np.arange(num_draws)
        table["sharpness"], table["top_p"] = sharpness, top_p
        draws = torch.from_numpy(table.view(np.uint8).reshape(num_draws, -1)).cuda()
        seconds = graph_seconds([partial(cuda_only.sample, logits, draws, drawn, None)])
        yield Timing(f"sample {name} 256 x 128256", "quire", seconds, logits.nbytes)


def time_blocks(kernels: KernelBackend, cuda_only: CudaOnlyKernels | None) -> Iterator[Timing]:
    """Copies-on-write, and swaps of 256 blocks each way, by both methods and at several sizes of a block."""
    for block_size in (1, 16, 64):
        torch.cuda.empty_cache()
        pool = torch.zeros((1024, *_block_shape(block_size)), dtype=torch.bfloat16, device="cuda")
        if block_size == 16:
            pairs = torch.randperm(1024)[:512].view(-1, 2).cuda()
            seconds = event_seconds(partial(kernels.copy_blocks, pool, pairs), 5)
            yield Timing("copy 256 blocks of 16", "quire", seconds, 2 * 256 * pool[0].nbytes)
        if cuda_only is not None:
            yield from _time_swaps(cuda_only, pool, block_size)


def _time_swaps(cuda_only: CudaOnlyKernels, pool: torch.Tensor, block_size: int) -> Iterator[Timing]:
    host = torch.zeros((256, *pool.shape[1:]), dtype=pool.dtype, pin_memory=True)
    there = torch.stack((torch.randperm(len(pool))[:256], torch.randperm(256)), dim=1).contiguous().pin_memory()
    back = there.flip(1).contiguous().pin_memory()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for method, how in ((cuda_abi.SWAP_COPY_ENGINE, "batched copy"), (cuda_abi.SWAP_KERNEL, "kernel")):
            for to_host, pairs in ((True, there), (False, back)):
                swap = partial(cuda_only.swap_blocks, pool, host, pairs, to_host=to_host, method=method)
                name = f"swap {'out' if to_host else 'in'} 256 blocks of {block_size}, {how}"
                ceiling = "to_host" if to_host else "to_device"
                yield Timing(name, "quire", event_seconds(swap, 5), host.nbytes, ceiling=ceiling)


def _block_shape(block_size: int) -> tuple[int, ...]:
    """One block of Llama-8B, all layers."""
    return (32, 2, 8, block_size, 128)
