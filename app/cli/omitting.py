"""Keeps lines of a known text off standard output."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO


@contextmanager
def lines_omitted(text: str) -> Iterator[None]:
    """While it lasts, what is printed in one piece with this text in it is not, nor the end of its line."""
    with redirect_stdout(_Omitting(sys.stdout, text)):
        yield


class _Omitting(io.TextIOBase):
    """A line is printed as its text and its end; any thread may print."""

    def __init__(self, stream: TextIO, text: str) -> None:
        self._stream = stream
        self._text = text
        self._at_its_end = False

    def write(self, printed: str) -> int:
        omits = self._text in printed or (self._at_its_end and printed == "\n")
        self._at_its_end = self._text in printed and not printed.endswith("\n")
        return len(printed) if omits else self._stream.write(printed)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
