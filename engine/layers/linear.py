"""Linear layers; several projections of one input are one product, filled from the checkpoint's tensor of each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from engine.kernels.backend import KernelBackend
from engine.layers.lora import LinearAdapters
from engine.layers.quantized_weight import QuantizedWeight, WeightFormat
from engine.layers.weight import WeightTarget


class Linear:
    """`y = x Wᵀ + b` with W `[sum(out_features), in_features]`, contiguous.

    Several `out_features` are projections of the same input as one product, their rows one after the other: q, k and v
    of attention, gate and up of a gated MLP.

    Args:
        weight_format: holds W in 8 bits; None in `dtype`.

    Attributes:
        parts: the projections, as rows of `weight`.
        adapters: what is added for some rows of a step; None where there are no adapters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: Sequence[int],
        bias: bool,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: WeightFormat | None = None,
    ) -> None:
        num_rows = sum(out_features)
        self.weight: torch.Tensor | QuantizedWeight
        if weight_format is not None:
            self.weight = weight_format.allocate(num_rows, in_features, device)
        else:
            self.weight = torch.empty(num_rows, in_features, dtype=dtype, device=device)
        self.bias = torch.empty(num_rows, dtype=dtype, device=device) if bias else None
        self._kernels = kernels
        self.parts = [slice(end - size, end) for size, end in zip(out_features, accumulate(out_features), strict=True)]
        self.adapters: LinearAdapters | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._multiply(x, self.bias)
        if self.adapters is not None:
            self.adapters.add_to(y, x)
        return y

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.multiply(x, bias)
        return self._kernels.linear(x, self.weight, bias)

    def weight_targets(self, *names: str, transposed: bool = False) -> dict[str, WeightTarget]:
        """Where the checkpoint's tensors go.

        Args:
            names: one a projection, or a single one if the checkpoint has fused them too.
            transposed: the checkpoint stores weights as `[in_features, out_features]` (GPT-2's Conv1D).
        """
        parts = self.parts if len(names) > 1 else [slice(None)]
        targets: dict[str, WeightTarget] = {}
        for name, rows in zip(names, parts, strict=True):
            weight = self.weight[rows]
            targets[f"{name}.weight"] = WeightTarget.whole(weight.t() if transposed else weight)
            if self.bias is not None:
                targets[f"{name}.bias"] = WeightTarget.whole(self.bias[rows])
        return targets
