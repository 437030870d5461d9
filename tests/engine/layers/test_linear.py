"""Fused linear layers are their parts, side by side."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.reference import ReferenceBackend
from engine.layers import Embedding, Linear, LMHead

CPU = torch.device("cpu")
REFERENCE = ReferenceBackend()


def random_fill(targets: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in targets.items()}


def test_projections_with_biases_equal_separate_layers() -> None:
    layer = Linear(16, [32, 16, 16], bias=True, kernels=REFERENCE, dtype=torch.float32, device=CPU)
    targets = layer.weight_targets("attn.q", "attn.k", "attn.v")
    assert {name: target.shape for name, target in targets.items()} == {
        "attn.q.weight": (32, 16),
        "attn.q.bias": (32,),
        "attn.k.weight": (16, 16),
        "attn.k.bias": (16,),
        "attn.v.weight": (16, 16),
        "attn.v.bias": (16,),
    }
    weights = random_fill({name: torch.Size(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        target.load(weights[name])
    x = torch.randn(5, 16)
    parts = [x @ weights[f"attn.{name}.weight"].T + weights[f"attn.{name}.bias"] for name in "qkv"]
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=-1))


def test_a_fused_and_transposed_checkpoint_fills_all_projections_at_once() -> None:
    layer = Linear(16, [32, 16, 16], bias=True, kernels=REFERENCE, dtype=torch.float32, device=CPU)
    targets = layer.weight_targets("c_attn", transposed=True)
    assert {name: target.shape for name, target in targets.items()} == {
        "c_attn.weight": (16, 64),
        "c_attn.bias": (64,),
    }
    weights = random_fill({name: torch.Size(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        target.load(weights[name])
    x = torch.randn(5, 16)
    torch.testing.assert_close(layer(x), x @ weights["c_attn.weight"] + weights["c_attn.bias"])
    assert isinstance(layer.weight, torch.Tensor)
    assert layer.weight.is_contiguous()


def test_transposed_parts_land_in_their_rows() -> None:
    layer = Linear(4, [2, 3], bias=False, kernels=REFERENCE, dtype=torch.float32, device=CPU)
    targets = layer.weight_targets("a", "b", transposed=True)
    first, second = torch.randn(4, 2), torch.randn(4, 3)
    targets["a.weight"].load(first)
    targets["b.weight"].load(second)
    assert isinstance(layer.weight, torch.Tensor)
    assert torch.equal(layer.weight, torch.cat((first.T, second.T)))


def test_names_must_match_the_projections() -> None:
    with pytest.raises(ValueError, match="zip"):
        Linear(4, [2, 2, 2], bias=False, kernels=REFERENCE, dtype=torch.float32, device=CPU).weight_targets("a", "b")


def test_loading_converts_the_type() -> None:
    layer = Linear(4, [2, 2], bias=False, kernels=REFERENCE, dtype=torch.bfloat16, device=CPU)
    layer.weight_targets("gate", "up")["up.weight"].load(torch.full((2, 4), 1.0 + 2**-12))
    assert isinstance(layer.weight, torch.Tensor)
    assert torch.equal(layer.weight[2:], torch.ones(2, 4, dtype=torch.bfloat16))


def test_logits_are_float32_whatever_the_weights() -> None:
    embedding = Embedding(10, 4, torch.bfloat16, CPU)
    embedding.weight_targets("e")["e.weight"].load(torch.eye(10, 4))
    head = LMHead(10, 4, REFERENCE, torch.bfloat16, CPU, tied_to=embedding)
    logits = head(embedding(torch.tensor([2])))
    assert logits.dtype == torch.float32
    assert logits.argmax() == 2
    assert head.weight_targets("lm_head") == {}
    assert LMHead(10, 4, REFERENCE, torch.bfloat16, CPU).weight_targets("lm_head")["lm_head.weight"].shape == (10, 4)
