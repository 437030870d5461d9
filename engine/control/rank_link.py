"""Rank 0's line to one other rank: a thread that hears its answers, its signs of life and its end."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from engine.control.connection import Connection, ControlError, Frame, Kind
from engine.control.rank import STEP_NUMBER
from engine.errors import CommunicatorError, ConfigError, ModelLoadError, QuireError


class RankLink:
    """One rank as rank 0 sees it.

    Attributes:
        hello: what the rank said of itself.
        in_ring: its steps go through shared memory.
        heard_at: when it gave the last sign of life, by `time.monotonic()`.
        num_done: steps that it has finished, as of then.
    """

    def __init__(self, rank: int, connection: Connection, lose: Callable[[QuireError], None]) -> None:
        self.rank = rank
        self.connection = connection
        self.hello: dict[str, Any] = {}
        self.in_ring = False
        self.heard_at = time.monotonic()
        self.num_done = 0
        self._lose = lose
        self._answers: dict[int, queue.SimpleQueue[Frame]] = {
            kind: queue.SimpleQueue() for kind in (Kind.LOADED, Kind.READY, Kind.ADAPTER_READY)
        }
        self._thread = threading.Thread(target=self._listen, name=f"quire-rank-{rank}", daemon=True)

    def start(self) -> None:
        """Take the rank's HELLO, and listen from then on. Raises CommunicatorError."""
        try:
            self.hello = self.connection.expect(Kind.HELLO, 30.0).json()
        except ControlError as error:
            raise CommunicatorError(f"rank {self.rank} did not introduce itself: {error}") from None
        self._thread.start()

    def answer(self, kind: Kind, timeout_s: float) -> dict[str, Any] | None:
        """The rank's LOADED, READY or ADAPTER_READY; None if it has not come in time."""
        try:
            return self._answers[kind].get(timeout=timeout_s).json()
        except queue.Empty:
            return None

    def say_stop(self) -> None:
        """Ask the rank to end; no error if it has."""
        with contextlib.suppress(ControlError):
            self.connection.send(Kind.STOP, timeout_s=1.0)

    def close(self) -> None:
        """Hang up and end the thread."""
        self.connection.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5.0)

    def _listen(self) -> None:
        try:
            while True:
                frame = self.connection.receive(3600.0)
                if frame is None:
                    continue
                self.heard_at = time.monotonic()
                if frame.kind == Kind.BEAT:
                    (self.num_done,) = STEP_NUMBER.unpack(frame.body)
                elif frame.kind == Kind.FAILED:
                    self._lose(self._failure_of(frame))
                elif frame.kind in self._answers:
                    self._answers[frame.kind].put(frame)
        except ControlError as error:
            self._lose(CommunicatorError(f"rank {self.rank} has died or cannot be reached: {error}"))

    def _failure_of(self, frame: Frame) -> QuireError:
        """What a rank says of its end, as an error of its own class where that is the user's to mend."""
        told = frame.json()
        name, message = str(told.get("error")), str(told.get("message"))
        for kind in (ConfigError, ModelLoadError):
            if name == kind.__name__:
                return kind(f"rank {self.rank}: {message}")
        return CommunicatorError(f"rank {self.rank} failed: {name}: {message}")
