"""Both norms against torch's modules, alone and after the residual's addition."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch

from engine.kernels.reference import ReferenceBackend
from engine.layers import LayerNorm, RMSNorm, build_norm
from engine.loading.dummy_shapes import SHAPES

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms_equal_torch(kind: Literal["rms_norm", "layer_norm"]) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SHAPES["tiny"], norm=kind, norm_eps=1e-2)
    norm = build_norm(config, ReferenceBackend(), torch.float32, CPU)
    theirs = (torch.nn.RMSNorm if kind == "rms_norm" else torch.nn.LayerNorm)(64, eps=1e-2)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter)
        norm.weight_targets("n")[f"n.{name}"].load(parameter.detach())
    assert len(norm.weight_targets("n")) == len(list(theirs.parameters()))

    x, residual = torch.randn(3, 64) + 0.5, torch.randn(3, 64)
    total = x + residual
    with torch.no_grad():
        torch.testing.assert_close(norm(x), theirs(x))
        torch.testing.assert_close(norm.add(x, residual), theirs(total))
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_offset_is_added_before_the_weight_is_rounded(dtype: torch.dtype) -> None:
    """Gemma's checkpoints store w and mean 1 + w."""
    config = dataclasses.replace(SHAPES["tiny"], norm_weight_offset=1.0)
    norm = build_norm(config, ReferenceBackend(), dtype, CPU)
    assert isinstance(norm, RMSNorm)
    stored = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm.weight_targets("n")["n.weight"].load(stored)
    assert torch.equal(norm.weight, (1.0 + stored.float()).to(dtype))


def test_the_norm_is_the_configured_one() -> None:
    kernels = ReferenceBackend()
    assert isinstance(build_norm(SHAPES["llama-13b"], kernels, torch.float32, CPU), RMSNorm)
    assert isinstance(build_norm(SHAPES["opt-13b"], kernels, torch.float32, CPU), LayerNorm)
