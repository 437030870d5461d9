"""Host memory that a GPU copies from and to beside the host's own work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class PinnedBuffer:
    """A tensor in pinned host memory and one like it on the device; on a CPU they are one and the same."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, on_device: torch.Tensor
    ) -> None:
        self.host = torch.zeros(shape, dtype=dtype, pin_memory=True) if device.type == "cuda" else on_device
        self._on_device = on_device

    def to_device(self, *index: slice) -> torch.Tensor:
        """The device's part at `index`, as the host's is now: the copy is queued, and the host's part must stay."""
        target = self._on_device[index]
        if self.host is not self._on_device:
            target.copy_(self.host[index], non_blocking=True)
        return target

    def send(self, values: Sequence[int]) -> torch.Tensor:
        """Queue the copy of a few values, the first of a one-dimensional buffer; the device's part."""
        self.host.numpy()[: len(values)] = values
        return self.to_device(slice(len(values)))


class PinnedPair:
    """Two host buffers that take turns over one on the device.

    While a step runs, its copy from the one may still be to come, and the next step fills the other. Two are enough,
    as no more than two steps are in flight.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.on_device = torch.zeros(shape, dtype=dtype, device=device)
        self._buffers = [PinnedBuffer(shape, dtype, device, self.on_device) for _ in range(2)]
        self._turn = 0

    def next(self) -> PinnedBuffer:
        self._turn = 1 - self._turn
        return self._buffers[self._turn]


def copy_to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A table's bytes, uint8 `[len(array), bytes of one]`, on the device: by way of pinned memory, the copy queued."""
    source = torch.from_numpy(array.view(np.uint8).reshape(len(array), array.itemsize))
    if device.type == "cpu":
        return source.clone()
    # torch keeps pinned memory that is let go of until the copies from it have ended.
    pinned = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return pinned.copy_(source).to(device, non_blocking=True)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, queued on the current stream; on a CPU a copy that is done."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    # torch keeps pinned memory that is let go of until the copies into it have ended.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
