"""Where a checkpoint's tensor goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class WeightTarget(NamedTuple):
    """The place of one checkpoint tensor in the model.

    Attributes:
        shape: shape of the whole tensor in the checkpoint.
        load: copies it, or this rank's part of it, to its place, converting type and device.
    """

    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], object]

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> WeightTarget:
        """The checkpoint's tensor fills `tensor`, which may be a view."""
        return cls(tuple(tensor.shape), tensor.copy_)
