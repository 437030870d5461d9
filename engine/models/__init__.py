"""Models by the architecture that a checkpoint names."""

from __future__ import annotations

import torch

from engine.config import ModelConfig
from engine.errors import UnsupportedModelError
from engine.kernels.backend import KernelBackend
from engine.models.causal_lm import CausalLM
from engine.models.llama import LlamaForCausalLM

__all__ = ["REGISTRY", "CausalLM", "build_model"]

# Mistral, Qwen2 and Qwen3 are Llama with a sliding window, biases on q, k and v, or norms on q and k.
REGISTRY = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
}


def build_model(config: ModelConfig, kernels: KernelBackend, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model of `config.architecture`, its weights not yet filled."""
    if config.architecture not in REGISTRY:
        raise UnsupportedModelError(f"architecture {config.architecture}", REGISTRY)
    return REGISTRY[config.architecture](config, kernels, dtype, device)
