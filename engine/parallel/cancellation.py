"""Lets one thread end what another does while the ranks come together."""

from __future__ import annotations

import ctypes

from engine.errors import CommunicatorError


class Cancellation:
    """A word that is set once, for good. Whoever loads, or waits for other ranks to join, looks at it now and then."""

    def __init__(self) -> None:
        self._word = ctypes.c_int32(0)

    def set(self) -> None:
        """Any thread may call it."""
        self._word.value = 1

    def is_set(self) -> bool:
        return self._word.value != 0

    def check(self) -> None:
        """Raise CommunicatorError if it is set."""
        if self.is_set():
            raise CommunicatorError("cancelled")

    @property
    def address(self) -> int:
        """Of the int32, other than 0 once it is set; it holds as long as this object lives."""
        return ctypes.addressof(self._word)
