"""Where a checkpoint's tensor goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from engine.loading.tensor_part import TensorPart


class WeightPlace(Protocol):
    """What can be filled: a tensor, or what stands for one."""

    @property
    def shape(self) -> torch.Size: ...

    def copy_(self, values: torch.Tensor, /) -> object: ...


class WeightTarget(NamedTuple):
    """The place of one checkpoint tensor in the model.

    Attributes:
        shape: shape of the whole tensor in the checkpoint.
        load: copies it, or this rank's part of it, to its place, converting type and device.
        part: what is to be read of it; None is all.
    """

    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], object]
    part: TensorPart | None = None

    @classmethod
    def whole(cls, tensor: WeightPlace) -> WeightTarget:
        """The checkpoint's tensor fills `tensor`, which may be a view."""
        return cls(tuple(tensor.shape), tensor.copy_)

    @classmethod
    def sharded(cls, tensor: WeightPlace, size: int, dim: int, *stretches: range) -> WeightTarget:
        """Stretches of dimension `dim` of the checkpoint's tensor, `size` there, fill `tensor`."""
        part = TensorPart(dim, stretches)
        shape = (*tensor.shape[:dim], size, *tensor.shape[dim + 1 :])
        assert part.shape(shape) == tuple(tensor.shape)
        return cls(shape, tensor.copy_, part if stretches != (range(size),) else None)
