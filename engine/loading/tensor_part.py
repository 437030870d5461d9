"""A part of a checkpoint's tensor: what one rank of several reads of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class TensorPart(NamedTuple):
    """Stretches of one dimension, one after the other; all of the others. Dimension 0 is rows, 1 columns."""

    dim: int
    stretches: tuple[range, ...]

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        size = sum(map(len, self.stretches))
        return (*whole[: self.dim], size, *whole[self.dim + 1 :])

    def share(self, whole: tuple[int, ...]) -> float:
        """The fraction of the tensor that this is."""
        return math.prod(self.shape(whole)) / max(1, math.prod(whole))


class CheckpointTensor(NamedTuple):
    """A tensor that is read when it is asked for, whole or in part.

    Attributes:
        shape: of the whole.
        read: the values, whole for None, on the CPU; see `Checkpoint.tensors` for how long it may be called.
    """

    shape: tuple[int, ...]
    read: Callable[[TensorPart | None], torch.Tensor]


def cut(tensor: torch.Tensor, part: TensorPart | None) -> torch.Tensor:
    """The part of a tensor that is in memory, a view if it is one stretch."""
    import torch

    if part is None:
        return tensor
    parts = [tensor.narrow(part.dim, stretch.start, len(stretch)) for stretch in part.stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, part.dim)
