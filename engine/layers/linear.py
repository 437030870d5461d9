"""Linear layers; those that several checkpoint tensors share are filled shard by shard."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from engine.layers.weight import WeightTarget


class Linear:
    """`y = x Wᵀ + b` with W `[out_features, in_features]`, contiguous."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return self._row_targets(prefix, slice(None))

    def _row_targets(self, prefix: str, rows: slice) -> dict[str, WeightTarget]:
        targets = {f"{prefix}.weight": WeightTarget.whole(self.weight[rows])}
        if self.bias is not None:
            targets[f"{prefix}.bias"] = WeightTarget.whole(self.bias[rows])
        return targets


class QKVLinear(Linear):
    """The three projections of attention as one product; its rows are those of q, then k, then v."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias, dtype, device)
        self.q_size = num_heads * head_dim
        self.kv_size = num_kv_heads * head_dim

    def shard(self, name: Literal["q", "k", "v"]) -> slice:
        """The rows of one projection."""
        q, kv = self.q_size, self.kv_size
        return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}[name]

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **self._row_targets(f"{prefix}.q_proj", self.shard("q")),
            **self._row_targets(f"{prefix}.k_proj", self.shard("k")),
            **self._row_targets(f"{prefix}.v_proj", self.shard("v")),
        }


class GateUpLinear(Linear):
    """The two inner projections of a gated MLP as one product; gate first."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(hidden_size, 2 * intermediate_size, bias, dtype, device)
        self.intermediate_size = intermediate_size

    def shard(self, name: Literal["gate", "up"]) -> slice:
        """The rows of one projection."""
        inner = self.intermediate_size
        return {"gate": slice(0, inner), "up": slice(inner, 2 * inner)}[name]

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {
            **self._row_targets(f"{prefix}.gate_proj", self.shard("gate")),
            **self._row_targets(f"{prefix}.up_proj", self.shard("up")),
        }
