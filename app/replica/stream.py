"""What a replica keeps of one attempt at a request."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from app.telemetry.engine_trace import EngineTrace


@dataclass(slots=True)
class Stream:
    """One attempt at a request: who reads it, and what it has sent. Changed on the server's thread once admitted.

    `done` is its Serve call's, once that has come. `refusal`: why it was not admitted, if SUBMIT brought it.
    """

    key: str
    request_id: str
    ingress_id: str
    attempt: int
    submitted_s: float
    loop: asyncio.AbstractEventLoop | None = None
    done: asyncio.Future[None] | None = None
    refusal: Exception | None = None
    aborted: bool = False
    ended: bool = False
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    waited_s: float = 0.0
    finish_reasons: dict[int, str] = field(default_factory=dict)
    trace: EngineTrace | None = None

    def claim(self) -> asyncio.Future[None]:
        """Its Serve call is here, and waits for this. On the call's loop."""
        self.loop = asyncio.get_running_loop()
        self.done = self.loop.create_future()
        # `end` sets the one and then looks for the other: whichever of both comes second wakes the call.
        if self.ended:
            self._wake()
        return self.done

    def end(self) -> None:
        """Let the Serve call return."""
        self.ended = True
        if self.done is not None and self.loop is not None:
            # A closed loop raises: the caller has gone with the replica.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    def record(self) -> dict[str, Any]:
        """The call's reply: what the socket's final record said, for whoever has only the call."""
        return {
            "request_id": self.request_id,
            "attempt": self.attempt,
            "num_output_tokens": self.num_output_tokens,
            "num_cached_tokens": self.num_cached_tokens,
            "finish_reasons": [self.finish_reasons[index] for index in sorted(self.finish_reasons)],
        }
