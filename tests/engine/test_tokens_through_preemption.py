"""Tokens and log-probabilities of every decoding method, each group of which is preempted several times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.execution.hardware import find_hardware
from engine.execution.simulated import VirtualClock, build_simulated_engine
from engine.loading import open_checkpoint
from engine.request import EngineRequest

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "samples": {"n": 3, "temperature": 1.0, "seed": 7},
    "best_of": {"n": 2, "best_of": 4, "temperature": 0.9, "seed": 11},
    "beams": {"n": 4, "temperature": 0.0, "use_beam_search": True},
}
# The oldest group that runs is never preempted. So that each of those under test is, these come before them: they end
# one after another, and each time what has come back to their place is pushed out by the growth of the others.
NUM_ELDERS = 10


class Completion(NamedTuple):
    token_ids: list[int]
    logprob: float


def requests(methods: list[str], num_each: int) -> list[EngineRequest]:
    rng = np.random.default_rng(0)

    def request(name: str, num_prompt: int, **params: Any) -> EngineRequest:
        prompt = rng.integers(0, 512, num_prompt).tolist()
        return EngineRequest(name, prompt, SamplingParams(ignore_eos=True, logprobs=0, **params))

    elders = [request(f"elder {k}", 8, max_tokens=16 + 8 * k, temperature=0.0) for k in range(NUM_ELDERS)]
    groups = [
        request(f"{name} {k}", 6 + k, max_tokens=24, **METHODS[name]) for k in range(num_each) for name in methods
    ]
    return elders + groups


def make_engine(device: str, **options: Any) -> LLMEngine:
    config = EngineConfig.from_dict({"block_size": 4, "max_model_len": 96, "max_num_seqs": 64, **options})
    if device.startswith("simulated"):
        config = dataclasses.replace(config, async_scheduling=device == "simulated ahead")
        model = open_checkpoint("dummy:tiny").model_config()
        return build_simulated_engine(model, find_hardware("h200"), config, VirtualClock())[0]
    return LLMEngine.from_options("dummy:tiny", config)


def run(engine: LLMEngine, requests: list[EngineRequest]) -> tuple[dict[tuple[str, int], Completion], dict[str, int]]:
    """Each sequence's output, and how often each request was preempted."""
    for request in requests:
        engine.add_request(request)
    groups = {request_id: engine._live[request_id] for request_id in engine._live.request_ids}
    tokens: dict[tuple[str, int], list[int]] = {}
    logprobs: dict[tuple[str, int], list[float]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            key = output.request_id, output.index
            assert output.logprobs is not None
            tokens.setdefault(key, []).extend(output.token_ids)
            logprobs.setdefault(key, []).extend(item.logprob for item in output.logprobs)
            if output.cumulative_logprob is not None:
                assert output.cumulative_logprob == pytest.approx(math.fsum(logprobs[key]), rel=1e-6)
    engine.check_invariants()
    outputs = {key: Completion(tokens[key], math.fsum(logprobs[key])) for key in tokens}
    return outputs, {request_id: group.num_preemptions for request_id, group in groups.items()}


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("methods", [[name] for name in METHODS] + [list(METHODS)], ids="+".join)
@pytest.mark.parametrize("device", ["simulated", "simulated ahead", "cpu"])
def test_tokens_and_logprobs_survive_preemptions_of_each_group(
    device: str, methods: list[str], preemption: str
) -> None:
    batch = requests(methods, num_each=2 if len(methods) == 1 else 1)
    undisturbed, counts = run(make_engine(device, num_blocks=1000), batch)
    assert not any(counts.values())
    small = make_engine(
        device, num_blocks=32, preemption=preemption, num_swap_blocks=200 if preemption == "swap" else 0
    )
    outputs, counts = run(small, batch)
    assert {key: output.token_ids for key, output in outputs.items()} == {
        key: output.token_ids for key, output in undisturbed.items()
    }
    for key, output in outputs.items():
        assert output.logprob == pytest.approx(undisturbed[key].logprob, rel=1e-5), key
    # Scheduling ahead, an elder's end frees its blocks a step later, and others wait for them rather than preempt.
    least = 1 if device == "simulated ahead" else 2
    assert all(counts[request.request_id] >= least for request in batch[NUM_ELDERS:]), (
        f"the pool is not small: {counts}"
    )
    stats = small.stats()
    assert stats.num_swaps == (stats.num_preemptions if preemption == "swap" else 0)
