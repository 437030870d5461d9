"""The rotary table equals transformers', bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from engine.layers import build_cos_sin
from engine.model_config import ModelConfig, RopeScaling

MAX_POSITIONS = 20000


def config(head_dim: int, theta: float, scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig("LlamaForCausalLM", 8, 64, 64, 1, 2, 2, head_dim, MAX_POSITIONS, 1e-6, theta, scaling)


def transformers_table(head_dim: int, parameters: dict[str, Any]) -> torch.Tensor:
    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters=parameters,
        )
    )
    positions = torch.arange(MAX_POSITIONS).unsqueeze(0)
    cos, sin = rotary(torch.zeros(1), positions)
    half = head_dim // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)


@pytest.mark.parametrize(
    ("head_dim", "scaling", "parameters"),
    [
        (64, None, {"rope_type": "default", "rope_theta": 100000.0}),
        (128, None, {"rope_type": "default", "rope_theta": 10000.0}),
        (64, RopeScaling("linear", 4.0), {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (
            128,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            64,
            RopeScaling("llama3", 32.0, 1.0, 4.0, 512),
            {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
    ],
)
def test_table_equals_transformers(head_dim: int, scaling: RopeScaling | None, parameters: dict[str, Any]) -> None:
    table = build_cos_sin(config(head_dim, parameters["rope_theta"], scaling), torch.device("cpu"))
    assert table.dtype == torch.float32
    assert torch.equal(table, transformers_table(head_dim, parameters))


def test_local_layers_have_a_base_of_their_own_and_no_scaling() -> None:
    cpu = torch.device("cpu")
    mixed = dataclasses.replace(config(16, 1e6, RopeScaling("linear", 8.0)), rope_local_theta=1e4)
    assert torch.equal(build_cos_sin(mixed, cpu, local=True), build_cos_sin(config(16, 1e4, None), cpu))
    assert torch.equal(build_cos_sin(mixed, cpu), build_cos_sin(config(16, 1e6, RopeScaling("linear", 8.0)), cpu))


def test_one_divisor_a_frequency() -> None:
    """As position p of a frequency divided by 2 is position p / 2 of the plain one."""
    plain = build_cos_sin(config(4, 10000.0, None), torch.device("cpu"))
    scaled = build_cos_sin(config(4, 10000.0, RopeScaling("per_frequency", factors=(1.0, 2.0))), torch.device("cpu"))
    assert torch.equal(scaled[:, [0, 2]], plain[:, [0, 2]])
    torch.testing.assert_close(scaled[::2, [1, 3]], plain[: MAX_POSITIONS // 2, [1, 3]])
