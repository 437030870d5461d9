"""What the paper ran: models on hardware, memory policies, and how the simulated engine is built for one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.execution.hardware import find_hardware
from engine.execution.simulated import SimulatedExecutor, VirtualClock, build_simulated_engine
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig


@dataclass(frozen=True)
class Setup:
    """A model on a machine (Table 1). `num_slots` is the paper's KV pool in tokens."""

    title: str
    source: str
    hardware: str
    num_slots: int

    def model_config(self) -> ModelConfig:
        return open_checkpoint(self.source).model_config()


OPT_13B = Setup("OPT-13B", "dummy:opt-13b", "a100-40gb", 15_700)
OPT_66B = Setup("OPT-66B", "dummy:opt-66b", "4x-a100-40gb", 9_700)
OPT_175B = Setup("OPT-175B", "dummy:opt-175b", "8x-a100-80gb", 60_100)
LLAMA_13B = Setup("LLaMA-13B", "dummy:llama-13b", "a100-40gb", 15_700)


@dataclass(frozen=True)
class System:
    """A serving system of the paper, as options of the one engine: its memory policy and its batching."""

    name: str
    title: str
    colour: str
    options: Mapping[str, Any] = field(default_factory=dict)


PAGED = System("paged", "Quire (paged)", "tab:red", {"reservation": "paged"})
ORCA_ORACLE = System("orca_oracle", "Orca (Oracle)", "tab:green", {"reservation": "orca_oracle"})
ORCA_POW2 = System("orca_pow2", "Orca (Pow2)", "tab:orange", {"reservation": "orca_pow2"})
ORCA_MAX = System("orca_max", "Orca (Max)", "tab:blue", {"reservation": "orca_max"})
STATIC = System("static", "Static batching", "tab:purple", {"reservation": "orca_max", "batching": "static"})
ORCAS = (ORCA_MAX, ORCA_POW2, ORCA_ORACLE)
SYSTEMS = (STATIC, *ORCAS, PAGED)


def build_engine(setup: Setup, system: System, **options: Any) -> tuple[LLMEngine, SimulatedExecutor]:
    """The real engine over a simulated device on a virtual clock, with the paper's block size and no prefix cache."""
    block_size = options.get("block_size", 16)
    config = EngineConfig.from_dict(
        {
            "block_size": block_size,
            "num_blocks": setup.num_slots // block_size,
            "max_model_len": 2048,
            # Seats for all that the pool could hold: memory alone limits the batch, as in the paper.
            "max_num_seqs": 1024,
            "max_num_batched_tokens": 2560,
            "enable_prefix_caching": False,
            **system.options,
            **options,
        }
    )
    model = setup.model_config()
    return build_simulated_engine(
        model, find_hardware(setup.hardware), config, VirtualClock(), model_id=f"{setup.title}, simulated"
    )
