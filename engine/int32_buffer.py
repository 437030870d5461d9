"""A growing run of int32 values that hands out its content as a view."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]


class Int32Buffer:
    """An append-only int32 array with room to grow, so that appending one value copies nothing."""

    __slots__ = ("_data", "_size")

    def __init__(self, values: Iterable[int] | Int32Array = (), capacity: int = 16) -> None:
        initial = np.fromiter(values, dtype=np.int32) if not isinstance(values, np.ndarray) else values
        self._size = len(initial)
        self._data = np.empty(max(capacity, self._size + capacity), dtype=np.int32)
        self._data[: self._size] = initial

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        assert 0 <= index < self._size
        return int(self._data[index])

    def __setitem__(self, index: int, value: int) -> None:
        assert 0 <= index < self._size
        self._data[index] = value

    @property
    def view(self) -> Int32Array:
        """The content, without a copy; valid until the next append."""
        return self._data[: self._size]

    def append(self, value: int) -> None:
        if self._size == len(self._data):
            self._data = np.concatenate([self._data, np.empty_like(self._data)])
        self._data[self._size] = value
        self._size += 1

    def truncate(self, size: int) -> None:
        """Drop the values from index `size` on."""
        assert 0 <= size <= self._size
        self._size = size
