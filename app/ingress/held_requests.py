"""Requests that the balancer holds back until a replica comes free: looked at when one may have, and then sent on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from app.balancer import Balancer
from app.balancer.terms import Refusal

logger = logging.getLogger("ray.serve")

# A replica may come free sooner than foreseen, and is noticed within this.
_LONGEST_S = 0.02
# Looks follow one another no faster.
_SHORTEST_S = 0.001
# After a fault of ours the next look comes so much later.
_FAULT_S = 1.0


class HeldRequests:
    """A timer that runs while something is held. All on one event loop.

    Args:
        send: called with each booking that has a replica now.
        refuse: called with each that will have none in time, and why.
    """

    def __init__(self, balancer: Balancer, send: Callable[[int], None], refuse: Callable[[int, Refusal], None]) -> None:
        self._balancer = balancer
        self._send = send
        self._refuse = refuse
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def watch(self) -> None:
        """Something may be held."""
        delay_s = self._balancer.next_dispatch_s()
        if self._timer is None and delay_s is not None and not self._closed:
            delay_s = min(max(delay_s, _SHORTEST_S), _LONGEST_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._dispatch)

    def close(self) -> None:
        """Look no more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _dispatch(self) -> None:
        self._timer = None
        try:
            for number in self._balancer.dispatch():
                self._send(number)
            for number, refusal in self._balancer.take_refused():
                self._refuse(number, refusal)
        except Exception:
            # Whatever it was, those who wait must not wait for ever.
            logger.exception("looking through the requests that wait has failed")
            if not self._closed:
                self._timer = asyncio.get_running_loop().call_later(_FAULT_S, self._dispatch)
        else:
            self.watch()
