"""Logits of the native decoder against torch's float32 model, architecture by architecture."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.execution.native_runner import NativeModelRunner
from engine.loading.stored_tensor import FloatArray
from tests.engine.execution.native import (
    EXACT,
    Chunk,
    NativeSteps,
    alone,
    native_runner,
    relative_error,
    torch_logits,
)
from tests.engine.loading.checkpoints import FAMILIES, hf_model, save_hf
from tests.engine.models.architectures import CASES

pytestmark = pytest.mark.usefixtures("cpu")

PROMPT: list[int] = np.random.default_rng(3).integers(0, 256, 75).tolist()  # more than a tile of 64 keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model(folder: Path, architecture: str) -> str:
    return str(save_hf(hf_model(architecture), folder / architecture))


@cache
def expected_logits(source: str) -> FloatArray:
    return torch_logits(source, PROMPT)


def prompt_logits(runner: NativeModelRunner) -> FloatArray:
    return runner.logits(np.array(PROMPT, dtype=np.int32))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_torch(case: str, tmp_path: Path) -> None:
    architecture, overrides = CASES[case]
    source = str(save_hf(hf_model(architecture, **overrides), tmp_path))
    logits = prompt_logits(native_runner(source, **EXACT))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, torch_logits(source, PROMPT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_instruction_set_equals_torch(architecture: str, folder: Path, isa: str) -> None:
    source = model(folder, architecture)
    np.testing.assert_allclose(
        prompt_logits(native_runner(source, **EXACT)), expected_logits(source), atol=1e-4, rtol=1e-4, err_msg=isa
    )


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_block_sizes_equal_torch(block_size: int, kv_cache_dtype: str, folder: Path, isa: str) -> None:
    """On blocks in random order, the pool's other slots NaN, and where a block's tail is unwritten."""
    source = model(folder, "Gemma3ForCausalLM")
    options = EXACT | {"kv_cache_dtype": kv_cache_dtype, "block_size": block_size}
    runner = native_runner(source, num_blocks=512 // block_size, **options)
    steps = NativeSteps(runner, 2, len(PROMPT))
    logits = [steps.step([Chunk(1, PROMPT[:3])])[0], steps.step([Chunk(0, PROMPT[:9]), Chunk(1, PROMPT[3:])])[1]]
    error = relative_error(np.concatenate(logits), expected_logits(source))
    assert error < {"float32": 1e-5, "bfloat16": 0.02, "int8": 0.03}[kv_cache_dtype], isa


@pytest.mark.parametrize(
    ("options", "lowest", "highest"),
    [
        ({"kv_cache_dtype": "bfloat16"}, 1e-4, 0.02),
        ({"kv_cache_dtype": "int8"}, 1e-4, 0.03),
        ({"dtype": "bfloat16"}, 1e-4, 0.03),
        ({"quantization": "int8"}, 1e-4, 0.06),
        ({"quantization": "int8", "kv_cache_dtype": "int8"}, 1e-4, 0.06),
    ],
    ids=["bfloat16-cache", "int8-cache", "bfloat16", "int8", "int8-all"],
)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_coarser_types_stay_close(
    architecture: str, options: dict[str, Any], lowest: float, highest: float, folder: Path
) -> None:
    source = model(folder, architecture)
    error = relative_error(prompt_logits(native_runner(source, **EXACT | options)), expected_logits(source))
    assert lowest < error < highest  # rounded, and no more than that


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}], ids=["int8", "bfloat16"])
def test_instruction_sets_agree_on_coarser_types(options: dict[str, Any], folder: Path, isa: str) -> None:
    """Closer to each other than either is to float32: the same codes, sums in another order. AVX-512 BF16 rounds the
    rows that bfloat16 weights multiply as well."""
    source = model(folder, "LlamaForCausalLM")
    found = prompt_logits(native_runner(source, **EXACT | options))
    first = _first_logits(source, **options)
    rounds = options.get("dtype") == "bfloat16" and isa == "avx512_bf16"
    assert relative_error(found, first) < (1e-2 if rounds else 2e-3), isa


@cache
def _first_logits(source: str, **options: Any) -> FloatArray:
    """On whichever instruction set comes first."""
    return prompt_logits(native_runner(source, **EXACT | options))


def test_a_decode_equals_its_row_of_the_prompt(folder: Path) -> None:
    source = model(folder, "Qwen3ForCausalLM")
    runner = native_runner(source, **EXACT)
    whole = alone(runner, PROMPT)
    steps = NativeSteps(runner, 1, len(PROMPT))
    for position, token in enumerate(PROMPT):
        assert np.array_equal(steps.step([Chunk(0, [token])])[0][0], whole[position]), position
