"""How often the HTTP server of an ingress looks whether it should exit: uvicorn wakes ten times a second for it.

Serve starts that server in the replica's process and has no setting for it. An idle ingress would wake for nothing else
half as often.
"""

from __future__ import annotations

import asyncio

import uvicorn

# A server that is told to exit does so after its streams' ends, and within so long of them. The Date header has
# seconds too.
INTERVAL_S = 1.0
# `on_tick` renews the Date header at multiples of this, which wraps around below what it may count to.
_TICKS_OF_A_SECOND = 10
_TICKS_OF_A_DAY = 864_000


async def _main_loop(server: uvicorn.Server) -> None:
    tick = 0
    while not await server.on_tick(tick):
        tick = (tick + _TICKS_OF_A_SECOND) % _TICKS_OF_A_DAY
        await asyncio.sleep(INTERVAL_S)


def slow_down() -> None:
    """For all of uvicorn's servers that start in this process from now on."""
    uvicorn.Server.main_loop = _main_loop  # type: ignore[assignment, method-assign]
