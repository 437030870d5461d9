"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import RequestError


class StopResult(NamedTuple):
    """What may be shown now, and the stop string that ended the text, if one did.

    After a match `text` runs to the stop string (or through it, if it is to be included) and nothing follows.
    """

    text: str
    stop: str | None


class StopChecker:
    """Finds the stop string that is complete first, and never releases a character of it too early.

    How the text is cut into pieces does not matter: of several stop strings, the one that ends first wins, and of
    those that end together the longest.

    Args:
        stop: the stop strings; none is empty.
        include_stop_str_in_output: keep the matched string at the end of the text.

    Raises:
        RequestError: a stop string is empty.
    """

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False) -> None:
        if not all(stop):
            raise RequestError("stop strings must not be empty", param="stop")
        self._stop = tuple(dict.fromkeys(stop))
        self._include = include_stop_str_in_output
        self._held = ""  # not yet released: may still become a stop string
        self.matched: str | None = None

    def append(self, text: str, can_stop: bool = True) -> StopResult:
        """Take the next piece.

        Args:
            can_stop: False while fewer than `min_tokens` tokens are there: a stop string that is complete by the end
                of this piece does not count.
        """
        if self.matched is not None:
            return StopResult("", self.matched)
        if not self._stop:
            return StopResult(text, None)
        num_old = len(self._held)
        pending = self._held + text
        match = self._first_match(pending, num_old) if can_stop else None
        if match is None:
            num_free = len(pending) - self._num_held(pending)
            self._held = pending[num_free:]
            return StopResult(pending[:num_free], None)
        start, stop = match
        self.matched, self._held = stop, ""
        return StopResult(pending[: start + len(stop) if self._include else start], stop)

    def flush(self) -> str:
        """The text still held, when generation ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_old: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first, beyond the `num_old` characters already judged."""
        found = []
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
