"""Every kernel against the plain-torch reference in float32, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu.attention import AttentionCase, AttentionData, attend, make_data
from engine.decoding.sampler import Sampler
from engine.execution.device_draws import DeviceDraws
from engine.kernels.backend import KernelBackend
from engine.kernels.cuda_only import CudaOnlyKernels
from engine.kernels.reference import ReferenceBackend
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest

TOLERANCE = 4e-3  # of a bfloat16 result, relative to the norm of the exact one


class Check(NamedTuple):
    """One operation: the largest error relative to the exact result's norm, or the share of wrong values."""

    name: str
    error: float
    tolerance: float

    @property
    def passes(self) -> bool:
        return self.error <= self.tolerance  # not NaN


def run_checks(kernels: KernelBackend, cuda_only: CudaOnlyKernels | None) -> Iterator[Check]:
    yield from _dense_checks(kernels)
    yield from _attention_checks(kernels)
    if cuda_only is not None:
        yield from _draws(cuda_only)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The worst row's `|result - exact| / |exact|`."""
    difference = (result.float() - exact.float()).flatten(0, -2).norm(dim=-1)
    return float((difference / exact.float().flatten(0, -2).norm(dim=-1).clamp_min(1e-6)).max())


def _dense_checks(kernels: KernelBackend) -> Iterator[Check]:
    reference = ReferenceBackend()
    for dtype in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        x, residual = (torch.randn(37, 4096, device="cuda").to(dtype) for _ in range(2))
        weight = torch.randn(4096, device="cuda").to(dtype)
        exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
        yield Check(f"rms_norm {kind}", relative_error(kernels.rms_norm(x, weight, 1e-5), exact), TOLERANCE)
        total = (x.float() + residual.float()).to(dtype)
        exact = reference.rms_norm(total.float(), weight.float(), 1e-5)
        result = kernels.add_rms_norm(x, residual, weight, 1e-5)
        yield Check(f"add_rms_norm {kind}", relative_error(result, exact), TOLERANCE)
        yield Check(f"add_rms_norm's residual {kind}", relative_error(residual, total), 0.0)
        gate_up = torch.randn(37, 2 * 14336, device="cuda").to(dtype)
        exact = reference.silu_and_mul(gate_up.float())
        yield Check(f"silu_and_mul {kind}", relative_error(kernels.silu_and_mul(gate_up), exact), TOLERANCE)


def _attention_checks(kernels: KernelBackend) -> Iterator[Check]:
    reference = ReferenceBackend()
    for case in (
        AttentionCase("decode", 5, 1, 777, num_layers=2),
        AttentionCase("decode without groups", 5, 1, 100, 8, 8, 128, 2),
        AttentionCase("decode of 64", 3, 1, 1031, 9, 3, 64, 2),
        AttentionCase("prefill", 2, 130, 1000, num_layers=2),
    ):
        data = make_data(case)
        yield Check(f"rotate_and_cache, {case.name}", _rotation_error(kernels, reference, data), TOLERANCE)
        key, value = data.layer(1)
        exact = reference.paged_attention(data.query.float(), key.float(), value.float(), data.metadata, data.scale)
        yield Check(f"paged_attention, {case.name}", relative_error(attend(kernels, data, 1), exact), TOLERANCE)


def _rotation_error(kernels: KernelBackend, reference: KernelBackend, data: AttentionData) -> float:
    """Of the queries and of the whole layer that keys and values are written to."""
    case = data.case
    num_tokens = len(data.query)
    shape = (num_tokens, case.num_kv_heads, case.head_dim)
    key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    angles = torch.rand(case.seq_len, case.head_dim // 2, device="cuda") * 6.0
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    exact_query, exact_pool = data.query.float(), data.pool.float()
    reference.rotate_and_cache(
        exact_query, key.float(), value.float(), table, exact_pool[:, 1, 0], exact_pool[:, 1, 1], data.metadata
    )
    query = data.query.clone()
    kernels.rotate_and_cache(query, key, value, table, *data.layer(1), data.metadata)
    return max(relative_error(query, exact_query), relative_error(data.pool, exact_pool))


def _draws(cuda_only: CudaOnlyKernels) -> Iterator[Check]:
    """Tokens that the device draws and the host would not: a draw may fall within rounding of two tokens' border."""
    kinds = [{}, {"top_p": 0.95}, {"top_k": 50, "temperature": 0.8}, {"min_p": 0.1}, {"temperature": 0.0}]
    logits = torch.randn(64, 128256, device="cuda") * 3
    requests = [
        SampleRequest(
            index, str(index), SamplingParams(**kinds[index % 5]), index, 0, 5, 1, np.zeros(5, np.int32), 0.0  # type: ignore[arg-type]
        )
        for index in range(1000)
    ]  # fmt: skip
    rows = [index % 64 for index in range(1000)]
    drawn = DeviceDraws(cuda_only, (), 1000, torch.device("cuda")).draw(logits, requests, rows).result()
    expected = Sampler(()).sample(logits.cpu().numpy(), requests, rows)
    theirs = {token.seq_id: token.token_id for token in expected.tokens}
    wrong = sum(theirs[token.seq_id] != token.token_id for token in drawn.tokens)
    yield Check("sample, share of other tokens", wrong / 1000, 0.002)
