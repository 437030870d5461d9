"""The engine as a replica sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from engine.memory import BlockChanges
from engine.outputs import EngineAccounts, EngineStats, SequenceOutput
from engine.request import EngineRequest


class Engine(Protocol):
    """The part of AsyncLLMEngine that a replica uses."""

    def start(
        self,
        on_step: Callable[[list[SequenceOutput]], None] | None = None,
        on_blocks: Callable[[BlockChanges], None] | None = None,
    ) -> None:
        """Start the engine thread, which calls `on_step` once a step, outputs or none, and `on_blocks` before it if
        there are any."""
        ...

    def add_request(self, request: EngineRequest) -> None:
        """Check and queue a request."""
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its sequences; unknown ids are no error."""
        ...

    def stats(self) -> EngineStats:
        """Load as of the last step."""
        ...

    def accounts(self) -> EngineAccounts:
        """Load and memory of about a second ago; another object once there are new ones."""
        ...

    def check_health(self) -> None:
        """Raise EngineDeadError if the engine has failed, or has work and completes no step."""
        ...

    def shutdown(self) -> None:
        """End the engine."""
        ...
