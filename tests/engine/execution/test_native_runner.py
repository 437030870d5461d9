"""A sequence's logits do not depend on what runs beside it, on chunks, preemption, threads, or blocks: bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.execution.native_runner import NativeModelRunner
from engine.loading.stored_tensor import FloatArray
from tests.engine.execution.native import EXACT, Chunk, NativeSteps, alone, native_runner

pytestmark = pytest.mark.usefixtures("cpu")

WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32", "quantization": "none"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}
# One token, a tile of keys and its neighbours, and more than a segment of 512.
LENGTHS = (1, 17, 63, 64, 65, 150, 530)
NUM_TOKENS = 8192  # of the pool, whatever the block size


def make_runner(source: str, block_size: int, num_threads: int = 1, **options: Any) -> NativeModelRunner:
    return native_runner(
        source,
        num_blocks=NUM_TOKENS // block_size,
        num_swap_blocks=NUM_TOKENS // block_size,
        block_size=block_size,
        num_threads=num_threads,
        **options,
    )


def prompts(rng: np.random.Generator, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [rng.integers(0, 256, length).tolist() for length in lengths]


def run_mixed(
    runner: NativeModelRunner, sequences: list[list[int]], rng: np.random.Generator, preempt: bool
) -> list[FloatArray]:
    """All sequences' logits from random batches of random chunks; two are preempted on the way if `preempt`."""
    steps = NativeSteps(runner, len(sequences), 544, seed=int(rng.integers(1 << 30)))
    rows: list[list[FloatArray]] = [[] for _ in sequences]
    left = set(range(len(sequences)))
    preemptions = ["swap", "recompute"] if preempt else []
    while left:
        order = rng.permutation(sorted(left))[: rng.integers(1, len(left) + 1)].tolist()
        chunks = []
        for seq in order:
            rest = sequences[seq][steps.lengths[seq] :]
            size = int(rng.choice([1, 2, 47, 48, 49, 100])) if len(rest) > 3 else 1
            chunks.append(Chunk(seq, rest[:size]))
        for chunk, logits in zip(chunks, steps.step(chunks), strict=True):
            rows[chunk.seq].append(logits)
            if steps.lengths[chunk.seq] == len(sequences[chunk.seq]):
                left.discard(chunk.seq)
        begun = [seq for seq in left if steps.lengths[seq] > 1]
        if preemptions and begun:
            longest = max(begun, key=lambda seq: steps.lengths[seq])
            if preemptions.pop() == "swap":
                steps.swap_out_and_in(longest)
            else:
                steps.forget(longest)
                rows[longest].clear()
    assert not preemptions, "nothing was preempted"
    return [np.concatenate(parts) for parts in rows]


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_do_not_depend_on_the_batch(weights: str, kv_cache_dtype: str, block_size: int) -> None:
    rng = np.random.default_rng([block_size, len(kv_cache_dtype), len(weights)])
    options = WEIGHTS[weights] | {"kv_cache_dtype": kv_cache_dtype}
    runner = make_runner("dummy:tiny-gemma3", block_size, **options)
    sequences = prompts(rng, (1, 17, 64, 150))
    expected = [alone(runner, sequence) for sequence in sequences]
    for num_threads, preempt in ((1, True), (2, False)):
        other = make_runner("dummy:tiny-gemma3", block_size, num_threads, **options)
        check_equal(run_mixed(other, sequences, rng, preempt), expected)


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_long_sequences_do_not_depend_on_the_batch(weights: str, kv_cache_dtype: str, seed: int, isa: str) -> None:
    """Beyond one segment of keys, where a thread's part of a sequence ends, on each instruction set."""
    assert isa
    rng = np.random.default_rng(seed)
    options = WEIGHTS[weights] | {"kv_cache_dtype": kv_cache_dtype}
    runner = make_runner("dummy:tiny", 16, **options)
    sequences = prompts(rng, (1, 65, 530) if isa == "scalar" else LENGTHS)
    expected = [alone(runner, sequence) for sequence in sequences]
    mixed = make_runner("dummy:tiny", 16, 1 + seed, **options)
    check_equal(run_mixed(mixed, sequences, rng, preempt=True), expected)


def test_logits_of_a_prompt_longer_than_a_step(cpu: object) -> None:
    assert cpu
    token_ids = np.random.default_rng(0).integers(0, 256, 50).astype(np.int32)
    whole = make_runner("dummy:tiny", 4, **EXACT).logits(token_ids)
    assert np.array_equal(make_runner("dummy:tiny", 4, max_num_batched_tokens=7, **EXACT).logits(token_ids), whole)
    small = native_runner("dummy:tiny", num_blocks=3, block_size=16, **EXACT)
    with pytest.raises(ConfigError, match="50 tokens need 4 KV blocks, a sequence has 3"):
        small.logits(token_ids)


def test_phases_and_bytes_are_those_of_the_steps_run() -> None:
    runner = make_runner("dummy:tiny", 16, **EXACT | {"quantization": "int8", "kv_cache_dtype": "int8"})
    token_ids = np.arange(40, dtype=np.int32)
    runner.logits(token_ids)
    spent = runner.phase_seconds()
    assert spent["calls"] == 1
    assert all(spent[name] > 0 for name in ("gemm", "head", "attention", "other"))
    assert sum(spent[name] for name in ("gemm", "head", "attention", "other")) <= spent["total"]
    runner.reset_phases()
    assert not any(runner.phase_seconds().values())
    # 2 layers of 2 KV heads: 16 values and a float32 scale, for K and for V.
    assert runner.kv_bytes_per_token() == 2 * 2 * 2 * (16 + 4)
    # 34 bytes for 32 values; 2 layers of q, k, v, o and the gated MLP, and the tied head.
    assert runner.weight_bytes() == {
        "gemm": 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128) * 34 // 32,
        "head": 512 * 64 * 34 // 32,
    }


def check_equal(found: list[FloatArray], expected: list[FloatArray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(other).all()
        differing = np.flatnonzero((one != other).any(axis=1))
        assert np.array_equal(one, other), f"positions {differing.tolist()} of {len(other)} differ"
