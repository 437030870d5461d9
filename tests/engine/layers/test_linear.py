"""Fused linear layers are their parts, side by side."""

from __future__ import annotations

import torch

from engine.layers import Embedding, GateUpLinear, LMHead, QKVLinear

CPU = torch.device("cpu")


def random_fill(targets: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in targets.items()}


def test_qkv_with_biases_equals_three_layers() -> None:
    layer = QKVLinear(16, num_heads=4, num_kv_heads=2, head_dim=8, bias=True, dtype=torch.float32, device=CPU)
    targets = layer.weight_targets("attn")
    assert {name: target.shape for name, target in targets.items()} == {
        "attn.q_proj.weight": (32, 16),
        "attn.q_proj.bias": (32,),
        "attn.k_proj.weight": (16, 16),
        "attn.k_proj.bias": (16,),
        "attn.v_proj.weight": (16, 16),
        "attn.v_proj.bias": (16,),
    }
    weights = random_fill({name: torch.Size(target.shape) for name, target in targets.items()})
    for name, target in targets.items():
        target.load(weights[name])
    x = torch.randn(5, 16)
    parts = [x @ weights[f"attn.{name}_proj.weight"].T + weights[f"attn.{name}_proj.bias"] for name in "qkv"]
    torch.testing.assert_close(layer(x), torch.cat(parts, dim=-1))


def test_gate_comes_before_up() -> None:
    layer = GateUpLinear(16, 24, bias=False, dtype=torch.float32, device=CPU)
    targets = layer.weight_targets("mlp")
    assert list(targets) == ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    targets["mlp.gate_proj.weight"].load(torch.zeros(24, 16))
    targets["mlp.up_proj.weight"].load(torch.ones(24, 16))
    out = layer(torch.ones(1, 16))
    assert torch.equal(out, torch.cat((torch.zeros(1, 24), torch.full((1, 24), 16.0)), dim=-1))


def test_loading_converts_the_type() -> None:
    layer = GateUpLinear(4, 2, bias=False, dtype=torch.bfloat16, device=CPU)
    layer.weight_targets("mlp")["mlp.up_proj.weight"].load(torch.full((2, 4), 1.0 + 2**-12))
    assert torch.equal(layer.weight[2:], torch.ones(2, 4, dtype=torch.bfloat16))


def test_logits_are_float32_whatever_the_weights() -> None:
    embedding = Embedding(10, 4, torch.bfloat16, CPU)
    embedding.weight_targets("e")["e.weight"].load(torch.eye(10, 4))
    head = LMHead(10, 4, torch.bfloat16, CPU, tied_to=embedding)
    logits = head(embedding(torch.tensor([2])))
    assert logits.dtype == torch.float32
    assert logits.argmax() == 2
    assert head.weight_targets("lm_head") == {}
    assert LMHead(10, 4, torch.bfloat16, CPU).weight_targets("lm_head")["lm_head.weight"].shape == (10, 4)
