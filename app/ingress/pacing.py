"""How long a stream holds tokens back, by how busy the ingress is.

Every piece that leaves costs its way through ingress, proxy and client, however many tokens are in it. While the event
loop has time to spare each step's tokens leave at once; as it runs out of time, streams wait a little after each piece,
so that more steps share the next one. A stream's first tokens never wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# The bound that users are promised.
MAX_HOLD_S = 0.050
MIN_HOLD_S = 0.005
# How often the loop's share of its core is looked at.
INTERVAL_S = 0.1
# Above the first the hold grows, below the second it shrinks, between them it stays.
BUSY, IDLE = 0.75, 0.5
_STEP = 1.5


class Pacer:
    """Measures the event loop that it is asked on. Not thread-safe: one for each loop.

    Args:
        clock, cpu_clock: seconds of real time, and of CPU time of the calling thread.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._last_s, self._last_cpu_s = clock(), cpu_clock()
        self._hold_s = 0.0

    def hold_s(self) -> float:
        """Seconds that a stream should wait after a piece before it takes the next; 0 while the loop is not busy."""
        now_s = self._clock()
        elapsed_s = now_s - self._last_s
        if elapsed_s >= INTERVAL_S:
            cpu_s = self._cpu_clock()
            self._adapt((cpu_s - self._last_cpu_s) / elapsed_s)
            self._last_s, self._last_cpu_s = now_s, cpu_s
        return self._hold_s

    def _adapt(self, load: float) -> None:
        if load > BUSY:
            self._hold_s = min(MAX_HOLD_S, max(MIN_HOLD_S, self._hold_s * _STEP))
        elif load < IDLE:
            self._hold_s /= _STEP
            if self._hold_s < MIN_HOLD_S:
                self._hold_s = 0.0
