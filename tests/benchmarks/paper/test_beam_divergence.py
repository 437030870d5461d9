"""How far apart beams are: counted as blocks are shared, and the simulated language's like the real model's."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.paper.beam_divergence import BLOCK_SIZE, measure
from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.execution.hardware import find_hardware
from engine.execution.simulated import SimulatedExecutor, VirtualClock, build_simulated_engine
from engine.loading import open_checkpoint
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

MODEL = open_checkpoint("dummy:opt-13b").model_config()
PROMPT_LENGTHS = (7, 12, 16, 7, 14, 17, 15, 9)


def make_engine() -> tuple[LLMEngine, SimulatedExecutor]:
    config = EngineConfig.from_dict({"block_size": BLOCK_SIZE, "num_blocks": 2048, "enable_prefix_caching": False})
    return build_simulated_engine(MODEL, find_hardware("a100-40gb"), config, VirtualClock())


def make_prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, MODEL.vocab_size, count).tolist() for count in PROMPT_LENGTHS]


def test_what_is_saved_is_what_the_engine_counts() -> None:
    prompt = make_prompts()[0]
    divergence = measure(make_engine()[0], [prompt], 4, 60)
    engine, executor = make_engine()
    params = SamplingParams(best_of=4, use_beam_search=True, temperature=0.0, max_tokens=60, ignore_eos=True)
    engine.add_request(EngineRequest("0", prompt, params))
    counted = []
    while engine.has_unfinished_requests:
        engine.step()
        if len(executor.last_tables) == 4:
            entries = np.concatenate(executor.last_tables)
            counted.append(1.0 - len(np.unique(entries)) / len(entries))
    assert divergence.saved == pytest.approx(counted)
    assert all(age >= 1 for age in divergence.ancestor_age)


@pytest.mark.parametrize(("width", "saved", "age", "parent"), [(2, 28.4, 4.3, 0.26), (4, 41.7, 11.5, 0.66)])
def test_simulated_beams_part_like_the_real_models(width: int, saved: float, age: float, parent: float) -> None:
    """SmolLM2-135M's by 64 tokens: benchmarks/results/paper/beam_divergence.md."""
    divergence = measure(make_engine()[0], make_prompts(), width, 64)
    assert divergence.saved_until(64) == pytest.approx(saved, abs=4.0)
    assert float(np.mean(divergence.ancestor_age[16:])) == pytest.approx(age, rel=0.5)
    assert float(np.mean(divergence.same_parent)) == pytest.approx(parent, abs=0.15)
