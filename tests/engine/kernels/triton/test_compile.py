"""The Triton kernels compile for sm_80 and sm_90 without a GPU, in the tiles that they are launched with, and spill no
registers. What they compute is tested in the interpreter, and on GPUs by tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from engine.kernels.triton import adapters, matmul
from engine.kernels.triton.attention import DOT_TYPES
from engine.kernels.triton.attention_plan import AttentionShape, pad_dim, plan_attention
from engine.kernels.triton.copy_blocks import copy_blocks_kernel
from engine.kernels.triton.layer_norm import layer_norm_kernel
from engine.kernels.triton.paged_attention import merge_kernel, paged_attention_kernel
from engine.kernels.triton.quantized_rows import quantize_rows_kernel, scale_products_kernel
from engine.kernels.triton.rms_norm import rms_norm_kernel
from engine.kernels.triton.rotate_and_cache import rotate_and_cache_kernel
from engine.kernels.triton.silu_and_mul import silu_and_mul_kernel
from tests.engine.kernels.triton.compiling import SHARED_BYTES, Compiled, compile_kernel

NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
PLANS = {"decode": (1, False), "prefill": (900, False), "invariant": (1, True)}
METADATA = {"query_start_loc": "*i32", "seq_lens": "*i32", "block_tables": "*i32"}
SUMS = {"partial_out": "*fp32", "partial_stats": "*fp32"}


def floats(dtype: torch.dtype, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, NAMES[dtype])


def assert_fits(compiled: Compiled, capability: int) -> None:
    assert compiled.spilled == 0
    assert compiled.shared <= SHARED_BYTES[capability]


# A compilation takes seconds: what every change is tested with is the shape of most models, on the newer GPU.
SHAPES = [
    pytest.param(head_dim, dtype, plan, capability, marks=[] if usual else [pytest.mark.slow])
    for head_dim, dtype in ((128, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16))
    for plan in PLANS
    for capability in (80, 90)
    for usual in [(head_dim, dtype, capability) == (128, torch.bfloat16, 90)]
]


@pytest.mark.parametrize(("head_dim", "dtype", "plan", "capability"), SHAPES)
def test_paged_attention(head_dim: int, dtype: torch.dtype, plan: str, capability: int, tmp_path: Path) -> None:
    max_query_len, batch_invariant = PLANS[plan]
    shape = AttentionShape(1, max_query_len, max_query_len, 1000, 8, 4, head_dim, wide=False)
    launch = plan_attention(shape, 132, batch_invariant)[-1]
    compiled = compile_kernel(
        paged_attention_kernel,
        {**floats(dtype, "out", "query", "key_cache", "value_cache"), **METADATA, **SUMS, "scale": "fp32"},
        {
            "GROUP": shape.group,
            "HEAD_DIM": head_dim,
            "PADDED_DIM": pad_dim(head_dim),
            "BLOCK_SIZE": 16,
            "LANES": launch.tile.lanes,
            "TOKENS": launch.tile.tokens,
            "SEGMENT": launch.segment,
            "DOT_TYPE": DOT_TYPES[dtype],
        },
        capability,
        tmp_path,
        num_warps=launch.tile.num_warps,
        num_stages=launch.tile.num_stages,
        enable_fp_fusion=not batch_invariant,
    )
    assert_fits(compiled, capability)
    assert "cp.async" in compiled.ptx  # K and V of the next tiles are on their way meanwhile
    assert ("wgmma.mma_async" if plan == "prefill" and capability == 90 else "mma") in compiled.ptx
    if batch_invariant:
        assert "fma.rn.f32" not in compiled.ptx


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_matmul(capability: int, tmp_path: Path) -> None:
    tile = matmul.TILE
    compiled = compile_kernel(
        matmul.matmul_kernel,
        floats(torch.bfloat16, "out", "x", "weight", "bias"),
        {
            "IN_FEATURES": 4096,
            "OUT_FEATURES": 4096,
            "BIAS": True,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "K_TILE": tile.depth,
        },
        capability,
        tmp_path,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    assert_fits(compiled, capability)
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.ptx


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_other_kernels(capability: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    caches = floats(dtype, "key_cache", "value_cache")
    rows = {**floats(dtype, "x"), "scales": "*fp32"}
    row: dict[str, object] = {"DIM": 14336, "SMALLEST_SCALE": 1e-12}
    cases: tuple[tuple[Any, dict[str, str], dict[str, object]], ...] = (
        (quantize_rows_kernel, rows | {"codes": "*i8"}, row | {"TILE": 4096, "LARGEST": 127.0, "ROUND": True}),
        # Where there is no float8, its rows are not quantised either.
        *(
            [
                (
                    quantize_rows_kernel,
                    rows | {"codes": "*fp8e4nv"},
                    row | {"TILE": 4096, "LARGEST": 448.0, "ROUND": False},
                )
            ]
            if capability == 90
            else []
        ),
        (
            scale_products_kernel,
            {
                **floats(dtype, "out", "bias"),
                "products": "*i32",
                "row_scales": "*fp32",
                "channel_scales": "*fp32",
            },
            {"BIAS": True, "COLUMNS": 1024},
        ),
        (
            rms_norm_kernel,
            {**floats(dtype, "out", "x", "residual", "weight"), "eps": "fp32"},
            {"DIM": 4096, "PADDED_DIM": 4096, "ADD": True},
        ),
        (
            layer_norm_kernel,
            {**floats(dtype, "out", "x", "weight", "bias"), "eps": "fp32"},
            {"DIM": 5120, "PADDED_DIM": 8192},
        ),
        (silu_and_mul_kernel, floats(dtype, "out", "gate_up"), {"COLUMNS": 1024}),
        (copy_blocks_kernel, {"pool": "*i64", "pairs": "*i64"}, {"WORDS": 512}),
        (
            rotate_and_cache_kernel,
            {
                **floats(dtype, "query", "key", "value"),
                **caches,
                "cos_sin": "*fp32",
                "positions": "*i64",
                "slot_mapping": "*i64",
            },
            {
                "GROUP": 4,
                "PADDED_GROUP": 4,
                "HALF": 64,
                "PADDED_HALF": 64,
                "BLOCK_SIZE": 16,
                "ROTATE": True,
            },
        ),
        (merge_kernel, {**floats(dtype, "out"), **METADATA, **SUMS}, {"HEAD_DIM": 128, "PADDED_DIM": 128}),
    )
    for kernel, pointers, constants in cases:
        assert_fits(compile_kernel(kernel, pointers, constants, capability, tmp_path, num_warps=4), capability)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_adapters(capability: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    tables = {"partial": "*fp32", "rank_ends": "*i32", "tiles": "*i32"}
    sizes: dict[str, object] = {"PARTS": 3, "ROWS": adapters.TILE_ROWS, "RANKS": adapters.RANKS}
    cases: tuple[tuple[Any, dict[str, str], dict[str, object]], ...] = (
        (
            adapters.shrink_kernel,
            {**floats(dtype, "x"), **tables, "a_pointers": "*i64"},
            sizes | {"IN_FEATURES": 4096, "DEPTH": adapters.DEPTH, "SPLIT": adapters.SPLIT},
        ),
        (
            adapters.expand_kernel,
            {**floats(dtype, "y"), **tables, "b_pointers": "*i64", "column_tiles": "*i32"},
            sizes | {"SPLITS": 8, "COLUMNS": adapters.COLUMNS},
        ),
    )
    for kernel, pointers, constants in cases:
        compiled = compile_kernel(kernel, pointers, constants, capability, tmp_path, num_warps=adapters.NUM_WARPS)
        assert_fits(compiled, capability)
        assert "mma.sync" in compiled.ptx, "on tensor cores"
