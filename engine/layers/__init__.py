"""The building blocks of a decoder: plain objects that hold weights and call the kernels."""

from __future__ import annotations

from engine.layers.embedding import Embedding, LMHead
from engine.layers.linear import GateUpLinear, Linear, QKVLinear
from engine.layers.norm import RMSNorm
from engine.layers.rotary import build_cos_sin
from engine.layers.weight import WeightTarget

__all__ = ["Embedding", "GateUpLinear", "LMHead", "Linear", "QKVLinear", "RMSNorm", "WeightTarget", "build_cos_sin"]
