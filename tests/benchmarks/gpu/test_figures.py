"""Figures beside their targets."""

from __future__ import annotations

import math

from benchmarks.gpu.figures import (
    DECODE,
    FIXED_SPLIT,
    ONE_LAYER,
    PREFILL,
    SWAPS,
    Figure,
    attention_figures,
    block_figures,
)
from benchmarks.gpu.results import Missing, Rates, Timing

RATES = Rates(copy_bytes_per_s=4e12, flops_per_s=8e14, to_host_bytes_per_s=5e10, to_device_bytes_per_s=4e10)


def test_a_figure_says_whether_its_target_is_met() -> None:
    assert Figure("a", 0.9, least=0.85).line() == "= a: 0.9 (target at least 0.85: met)"
    assert Figure("a", 1.31, most=1.3).line() == "= a: 1.31 (target at most 1.3: MISSED)"
    assert Figure("a", 1.2).line() == "= a: 1.2"
    assert Figure("a", 1.2).json()["met"] is None
    assert Figure("a", math.nan, least=0.0).met is False
    assert Figure("a", math.nan, most=0.0).met is False


def test_attention_is_held_to_bandwidth_matrix_rate_and_the_best_paged_peer() -> None:
    timings = [
        Timing(DECODE, "quire", 100e-6, num_bytes=3.6e8),
        Timing(DECODE + FIXED_SPLIT, "quire", 150e-6, num_bytes=3.6e8),
        Timing(DECODE + ONE_LAYER, "quire", 95e-6, num_bytes=3.6e8),
        Timing(DECODE, "torch SDPA (dense)", 50e-6, num_bytes=3.6e8),
        Timing(DECODE, "FlashInfer", 110e-6, num_bytes=3.6e8),
        Timing(DECODE, "FlashAttention-3", 105e-6, num_bytes=3.6e8),
        Timing(PREFILL, "quire", 1e-3, num_bytes=1e6, flops=4.0e11),
    ]
    missing = [Missing(PREFILL, "vLLM Triton", "absent")]
    lines = [figure.line() for figure in attention_figures(timings, missing, RATES)]
    assert lines == [
        f"= decode attention, share of copy bandwidth ({DECODE}): 0.9 (target at least 0.85: met)",
        f"= FlashAttention-3's time over ours ({DECODE}): 1.05 (target at least 1: met)",
        f"= prefill attention, share of the matrix rate ({PREFILL}): 0.5 (target at least 0.6: MISSED)",
        f"= paged peers that could be imported ({PREFILL}): 0",
        f"= time in a pool of one layer over all: ratio ({DECODE}): 0.95",
        f"= time with fixed splits: ratio ({DECODE}): 1.5",
    ]
    assert list(attention_figures([], missing, RATES)) == []


def test_swaps_are_held_to_copies_in_their_direction() -> None:
    timings = [
        Timing(SWAPS[0], "quire", 1e-2, 4e8, ceiling="to_host"),
        Timing(SWAPS[1], "quire", 1e-2, 2e8, ceiling="to_device"),
    ]
    assert [(figure.value, figure.met) for figure in block_figures(timings, RATES)] == [(0.8, True), (0.5, False)]
