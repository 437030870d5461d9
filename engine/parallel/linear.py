"""Linear layers split over ranks (Megatron-LM, arXiv 1909.08053 §3): by output column, then by input row.

rank 0   x ─► W[:half]  ─► activation ─► V[:, :half] ─┐
                                                      ├─ all-reduce ─► y + b
rank 1   x ─► W[half:]  ─► activation ─► V[:, half:] ─┘
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from engine.kernels.backend import KernelBackend
from engine.layers.linear import Linear
from engine.layers.quantized_weight import WeightFormat
from engine.layers.weight import WeightTarget
from engine.parallel.torch_communicator import TorchCommunicator


class Projection(NamedTuple):
    """One projection of several that are one product: its output features, and this rank's of them."""

    size: int
    own: range


class ColumnParallelLinear(Linear):
    """This rank's output features of each projection."""

    def __init__(
        self,
        in_features: int,
        projections: Sequence[Projection],
        bias: bool,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: WeightFormat | None = None,
    ) -> None:
        sizes = [len(part.own) for part in projections]
        super().__init__(in_features, sizes, bias, kernels, dtype, device, weight_format)
        self._projections = projections

    def weight_targets(self, *names: str, transposed: bool = False) -> dict[str, WeightTarget]:
        targets: dict[str, WeightTarget] = {}
        for name, target, size, stretches in self._tensors(names):
            weight = self.weight[target].t() if transposed else self.weight[target]
            targets[f"{name}.weight"] = WeightTarget.sharded(weight, size, int(transposed), *stretches)
            if self.bias is not None:
                targets[f"{name}.bias"] = WeightTarget.sharded(self.bias[target], size, 0, *stretches)
        return targets

    def _tensors(self, names: Sequence[str]) -> list[tuple[str, slice, int, list[range]]]:
        """Each tensor of the checkpoint: its name, its rows here, its features in all, and which of them are these."""
        projections = self._projections
        if len(names) == 1:
            sizes = [part.size for part in projections]
            firsts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
            stretches = [
                range(first + part.own.start, first + part.own.stop)
                for first, part in zip(firsts, projections, strict=True)
            ]
            if stretches == [range(first, first + size) for first, size in zip(firsts, sizes, strict=True)]:
                stretches = [range(sum(sizes))]
            return [(names[0], slice(None), sum(sizes), stretches)]
        return [
            (name, rows, part.size, [part.own]) for name, rows, part in zip(names, self.parts, projections, strict=True)
        ]


class RowParallelLinear(Linear):
    """This rank's input features; the products are summed over the ranks, and the bias is added once.

    Args:
        in_features: of all ranks; `own` are this one's.
    """

    def __init__(
        self,
        in_features: int,
        own: range,
        out_features: int,
        bias: bool,
        kernels: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        communicator: TorchCommunicator | None,
        weight_format: WeightFormat | None = None,
    ) -> None:
        super().__init__(len(own), [out_features], bias, kernels, dtype, device, weight_format)
        self._in_features, self._own = in_features, own
        self._communicator = communicator

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._communicator is None:
            return super().__call__(x)
        y = self._multiply(x, None)
        if self.adapters is not None:
            # A of these features, and all of B: the sum over the ranks is theirs too.
            self.adapters.add_to(y, x)
        self._communicator.all_reduce(y)
        return y if self.bias is None else y.add_(self.bias)

    def weight_targets(self, *names: str, transposed: bool = False) -> dict[str, WeightTarget]:
        (name,) = names
        weight = self.weight.t() if transposed else self.weight
        targets = {f"{name}.weight": WeightTarget.sharded(weight, self._in_features, int(not transposed), self._own)}
        if self.bias is not None:
            targets[f"{name}.bias"] = WeightTarget.whole(self.bias)
        return targets
