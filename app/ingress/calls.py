"""The Serve calls of attempts: when each goes out, and what its end means.

A call exists so that Serve counts, cancels and drains the request; it stays open until that ends. It costs some
milliseconds of a core on both sides: where a replica has the request by SUBMIT already, its call follows when the first
token has gone out, or takes long, and not at all if the request has ended by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from app.ingress.attempt import Attempt, ClientOptions

logger = logging.getLogger("ray.serve")

# A first token's way out of the process.
_AFTER_TOKEN_S = 0.005


class CallOwner(Protocol):
    """Who has the attempts: hears how their calls go, of those only that are current."""

    def is_current(self, attempt: Attempt) -> bool:
        """Whether it is neither finished nor given up."""
        ...

    def check_placed(self, attempt: Attempt) -> None:
        """It has had its time to find a replica."""
        ...

    def call_failed(self, attempt: Attempt, error: Exception) -> None:
        """Its call has raised."""
        ...

    def call_cancelled(self, attempt: Attempt) -> None:
        """Serve has cancelled its call, as it does when the HTTP request ends."""
        ...

    def final_record_missing(self, attempt: Attempt) -> None:
        """Its call has returned, and the final record has not come in time."""
        ...


class Calls:
    """All calls of one client. All on one event loop.

    Args:
        client_id: names the client to replicas and to the request router.
    """

    def __init__(self, client_id: str, options: ClientOptions, owner: CallOwner) -> None:
        self._client_id = client_id
        self._options = options
        self._owner = owner
        self._generate: Any = None

    def call_by(self, generate: Any) -> None:
        """The handle's method that calls a replica; before the first call."""
        self._generate = generate

    def start(self, attempt: Attempt) -> None:
        """Call now."""
        self._cancel_timer(attempt)
        attempt.task = asyncio.get_running_loop().create_task(
            self._call(attempt), name=f"call {attempt.request.request_id}", context=attempt.context
        )

    def start_later(self, attempt: Attempt) -> None:
        """Its replica has it by SUBMIT: call when `first_token` says so, or it takes long."""
        attempt.call_due = _later(self._options.call_after_s, self.start, attempt)

    def first_token(self, attempt: Attempt) -> None:
        """Its first tokens are here, and on their way to the client."""
        if attempt.call_due is not None:
            self._cancel_timer(attempt)
            attempt.call_due = _later(min(_AFTER_TOKEN_S, self._options.call_after_s), self.start, attempt)

    def refused(self, attempt: Attempt) -> None:
        """Its replica did not take it by SUBMIT, and will tell the call why."""
        if attempt.call_due is not None:
            self.start(attempt)

    def drop(self, attempt: Attempt) -> None:
        """The request has ended: its call returns by itself, or is spared."""
        self._cancel_timer(attempt)

    def cancel(self, attempt: Attempt) -> None:
        """The attempt is given up."""
        self._cancel_timer(attempt)
        if attempt.response is not None:
            try:
                attempt.response.cancel()
            except Exception as error:
                # Serve raises here what the call had failed with; it is over either way.
                logger.debug("cancelling a call that had failed: %s", error)
        if attempt.task is not None and not attempt.task.done():
            attempt.task.cancel()

    def _cancel_timer(self, attempt: Attempt) -> None:
        if attempt.call_due is not None:
            attempt.call_due.cancel()
            attempt.call_due = None

    async def _call(self, attempt: Attempt) -> None:
        """A call from its start to its reply or failure."""
        owner = self._owner
        timeout = _later(self._options.placement_timeout_s, owner.check_placed, attempt)
        traced = {} if attempt.trace is None else {"trace": attempt.trace.carrier}
        try:
            attempt.response = self._generate.remote(
                attempt.request,
                ingress_id=self._client_id,
                attempt=attempt.number,
                waited_s=attempt.waited_s,
                **traced,
            )
            await attempt.response
        except asyncio.CancelledError:
            # By us, and then the attempt is gone; or by Serve, which cancels the calls of an HTTP request that ends.
            if owner.is_current(attempt):
                owner.call_cancelled(attempt)
        except Exception as error:
            if owner.is_current(attempt):
                owner.call_failed(attempt, error)
        else:
            if owner.is_current(attempt):
                # The last tokens travel another road and may come later, but not much.
                _later(self._options.final_record_s, owner.final_record_missing, attempt)
        finally:
            timeout.cancel()


def _later(delay_s: float, callback: Callable[[Attempt], None], attempt: Attempt) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(delay_s, callback, attempt)
