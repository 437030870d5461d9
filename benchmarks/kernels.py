"""Paged attention on this CPU: the native kernels against the plain-torch reference and the memory's own speed.

    python -m benchmarks.kernels [--num-threads N] [--seconds S]

Decode reads each cached key and value once, so its ceiling is the read bandwidth measured here; prefill is bound by
arithmetic. Each call takes the next of several layers, so that no cache holds its keys and values. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.kernels.backend import AttentionMetadata, KernelBackend
from engine.kernels.cpu import CpuBackend
from engine.kernels.reference import ReferenceBackend

BLOCK_SIZE = 16
POOL_BYTES = 192 << 20  # several times the last-level cache


class Case(NamedTuple):
    """A batch of equal sequences of one model's attention shape."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    num_seqs: int
    num_rows: int  # of each sequence in this step
    seq_len: int
    dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all sequences in one layer."""
        return 2 * self.num_seqs * self.seq_len * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of the visible pairs of row and token."""
        pairs = self.num_rows * self.seq_len - self.num_rows * (self.num_rows - 1) // 2
        return 4 * self.num_seqs * pairs * self.heads * self.head_dim


SMOLLM2, LLAMA_8B = (9, 3, 64), (32, 8, 128)
CASES = (
    Case("smollm2 decode, 32 x 512", *SMOLLM2, 32, 1, 512, torch.bfloat16),
    Case("smollm2 decode, 32 x 512, float32", *SMOLLM2, 32, 1, 512, torch.float32),
    Case("smollm2 decode, 1 x 4096", *SMOLLM2, 1, 1, 4096, torch.bfloat16),
    Case("llama-8b decode, 8 x 1024", *LLAMA_8B, 8, 1, 1024, torch.bfloat16),
    Case("smollm2 prefill, 512 of 2048", *SMOLLM2, 1, 512, 2048, torch.bfloat16),
    Case("smollm2 prefill, 512 of 512, float32", *SMOLLM2, 1, 512, 512, torch.float32),
    Case("llama-8b prefill, 256 of 1024", *LLAMA_8B, 1, 256, 1024, torch.bfloat16),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--num-threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments.add_argument("--seconds", type=float, default=0.5, help="time to spend on each measurement")
    options = arguments.parse_args()
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(0)
    cpu = CpuBackend(options.num_threads)

    bandwidth = read_bandwidth(options.seconds)
    print(f"{cpu.isa}, {options.num_threads} threads, memory read {bandwidth / 1e9:.1f} GB/s")
    results = [measure(case, cpu, bandwidth, options.seconds) for case in CASES]
    summary = {
        "benchmark": "kernels",
        "isa": cpu.isa,
        "num_threads": options.num_threads,
        "memory_read_gb_s": round(bandwidth / 1e9, 2),
        "attention": results,
    }
    print(json.dumps(summary))


def read_bandwidth(seconds: float) -> float:
    """Bytes a second of summing an array far larger than the caches."""
    data = torch.ones(256 << 18)
    return data.nbytes / best_time(lambda _: data.sum(), seconds)


def measure(case: Case, cpu: KernelBackend, bandwidth: float, seconds: float) -> dict[str, float | str]:
    query, layers, metadata = make_arguments(case)
    scale = case.head_dim**-0.5

    def run(backend: KernelBackend) -> float:
        def call(i: int) -> None:
            layer = layers[i % len(layers)]
            backend.paged_attention(query, layer[:, 0], layer[:, 1], metadata, scale)

        return best_time(call, seconds)

    native, reference = run(cpu), run(ReferenceBackend())
    read = case.kv_bytes / native
    print(
        f"{case.name:38} {native * 1e6:9.0f} us  {read / 1e9:5.1f} GB/s ({read / bandwidth:4.0%} of the memory's)  "
        f"{case.flops / native / 1e9:6.1f} GFLOP/s  {reference / native:5.1f} x the reference"
    )
    return {
        "case": case.name,
        "native_us": round(native * 1e6, 1),
        "reference_us": round(reference * 1e6, 1),
        "kv_gb_s": round(read / 1e9, 2),
        "share_of_memory_read": round(read / bandwidth, 3),
        "gflop_s": round(case.flops / native / 1e9, 1),
        "speedup": round(reference / native, 2),
    }


def make_arguments(case: Case) -> tuple[torch.Tensor, list[torch.Tensor], AttentionMetadata]:
    """Queries, the layers of a pool with blocks in random order, and the metadata."""
    blocks_each = -(-case.seq_len // BLOCK_SIZE)
    num_blocks = case.num_seqs * blocks_each
    num_layers = max(2, POOL_BYTES // case.kv_bytes)
    pool = torch.empty(num_blocks, num_layers, 2, case.kv_heads, BLOCK_SIZE, case.head_dim, dtype=case.dtype)
    pool.copy_(torch.randn(pool[:, :1].shape).to(case.dtype).expand_as(pool))
    num_tokens = case.num_seqs * case.num_rows
    metadata = AttentionMetadata(
        query_start_loc=torch.arange(0, num_tokens + 1, case.num_rows, dtype=torch.int32),
        seq_lens=torch.full((case.num_seqs,), case.seq_len, dtype=torch.int32),
        block_tables=torch.randperm(num_blocks).int().view(case.num_seqs, blocks_each),
        slot_mapping=torch.full((num_tokens,), -1),
        positions=torch.arange(case.seq_len - case.num_rows, case.seq_len).repeat(case.num_seqs),
        max_query_len=case.num_rows,
        max_seq_len=case.seq_len,
    )
    query = torch.randn(num_tokens, case.heads, case.head_dim).to(case.dtype)
    return query, [pool[:, layer] for layer in range(num_layers)], metadata


def best_time(call: Callable[[int], object], seconds: float) -> float:
    """Shortest time of call(i), i counting up, over at least three calls and `seconds`."""
    call(0)
    best, begin, i = float("inf"), time.perf_counter(), 1
    while i <= 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call(i)
        best = min(best, time.perf_counter() - start)
        i += 1
    return best


if __name__ == "__main__":
    main()
