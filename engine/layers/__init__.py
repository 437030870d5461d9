"""The building blocks of a decoder: plain objects that hold weights and call the kernels."""

from __future__ import annotations

from engine.layers.activation import Activation, build_activation
from engine.layers.embedding import Embedding, LMHead, PositionEmbedding
from engine.layers.linear import Linear
from engine.layers.norm import LayerNorm, Norm, RMSNorm, build_norm
from engine.layers.quantized_weight import WeightFormat
from engine.layers.rotary import build_cos_sin
from engine.layers.weight import WeightTarget

__all__ = [
    "Activation",
    "Embedding",
    "LMHead",
    "LayerNorm",
    "Linear",
    "Norm",
    "PositionEmbedding",
    "RMSNorm",
    "WeightFormat",
    "WeightTarget",
    "build_activation",
    "build_cos_sin",
    "build_norm",
]
