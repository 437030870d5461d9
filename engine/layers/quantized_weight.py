"""A linear layer's matrix in 8 bits with a scale for each output channel, quantised as it is loaded."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.errors import ConfigError
from engine.kernels.quantized_products import UNIT, RowKernels, TorchRowKernels, multiply_quantized

_LOADED_VALUES = 1 << 24  # quantised at once: they are float32 meanwhile


class WeightFormat(NamedTuple):
    """How the matrices of attention and MLP are held: codes of a type, and what goes with their products."""

    code_type: torch.dtype
    kernels: RowKernels

    def allocate(self, out_features: int, in_features: int, device: torch.device) -> QuantizedWeight:
        """Raises ConfigError for a matrix that torch's operators do not take."""
        unit = UNIT[self.code_type]
        if out_features % unit or in_features % unit:
            raise ConfigError(
                f"quantization to {str(self.code_type).removeprefix('torch.')} needs matrices whose sides are "
                f"multiples of {unit}; the model, or a rank's part of it, has one of {out_features} x {in_features}"
            )
        codes = torch.empty(out_features, in_features, dtype=self.code_type, device=device)
        scales = torch.empty(out_features, dtype=torch.float32, device=device)
        return QuantizedWeight(codes, scales, self.kernels)


class QuantizedWeight:
    """Codes `[out_features, in_features]` and float32 scales `[out_features]`.

    Where weights are loaded it stands for the tensor `codes * scales`: rows of it, and it transposed, can be filled.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, kernels: RowKernels) -> None:
        self.codes, self.scales = codes, scales
        self._kernels = kernels

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def __getitem__(self, rows: slice) -> QuantizedWeight:
        return QuantizedWeight(self.codes[rows], self.scales[rows], self._kernels)

    def t(self) -> TransposedWeight:
        return TransposedWeight(self)

    def copy_(self, values: torch.Tensor, /) -> None:
        """Quantise floats of any type and device. They are whole rows."""
        num_rows = max(1, _LOADED_VALUES // self.codes.shape[1])
        for first in range(0, len(self.codes), num_rows):
            some = slice(first, first + num_rows)
            moved = values[some].to(self.codes.device)
            self.codes[some], self.scales[some] = TorchRowKernels().quantize_rows(moved, self.codes.dtype, 0)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x Wᵀ + b` for x `[num_rows, in_features]`."""
        return multiply_quantized(x, self.codes, self.scales, bias, self._kernels)


class TransposedWeight:
    """The place of a tensor that the checkpoint stores as `[in_features, out_features]`."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self._weight = weight

    @property
    def shape(self) -> torch.Size:
        return torch.Size(reversed(self._weight.shape))

    def copy_(self, values: torch.Tensor, /) -> None:
        self._weight.copy_(values.t())
