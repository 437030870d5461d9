"""Activations against transformers' by the same names."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers.activations import ACT2FN

from engine.kernels.reference import ReferenceBackend
from engine.layers import build_activation
from engine.loading.dummy_shapes import SHAPES
from engine.model_config import PLAIN_ACTIVATIONS


@pytest.mark.parametrize("name", PLAIN_ACTIVATIONS)
def test_plain_activations_equal_transformers(name: str) -> None:
    activation = build_activation(dataclasses.replace(SHAPES["tiny-opt"], hidden_act=name), ReferenceBackend())
    x = torch.linspace(-8, 8, 999).view(3, 333)
    torch.testing.assert_close(activation(x), ACT2FN[name](x))


def test_a_gated_one_takes_gate_and_up() -> None:
    activation = build_activation(SHAPES["tiny"], ReferenceBackend())
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(activation(torch.cat((gate, up), dim=1)), expected)
