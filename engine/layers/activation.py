"""What a decoder's MLP does between its two products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from engine.kernels.backend import KernelBackend
from engine.model_config import ModelConfig

Activation = Callable[[torch.Tensor], torch.Tensor]

_TANH_GELU: Activation = partial(functional.gelu, approximate="tanh")
_PLAIN: dict[str, Activation] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
}


def build_activation(config: ModelConfig, kernels: KernelBackend) -> Activation:
    """From the first product, `[T, 2 * intermediate_size]` (gate first) if gated, to `[T, intermediate_size]`."""
    if not config.gated_mlp:
        return _PLAIN[config.hidden_act]
    if config.hidden_act == "silu":
        return kernels.silu_and_mul
    return partial(_gated, _PLAIN[config.hidden_act])


def _gated(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return activation(gate).mul_(up)
