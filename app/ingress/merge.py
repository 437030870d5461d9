"""Several asynchronous generators read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Yield the items of all streams as they come; the first error ends them all.

    Closing this generator closes every stream. No stream runs ahead of the reader by more than one item, and none
    starves another.
    """
    waiting = {asyncio.create_task(_next(stream)): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                for item in task.result():
                    yield item
                    waiting[asyncio.create_task(_next(waiting[task]))] = waiting[task]
                del waiting[task]
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Item, None]) -> tuple[Item, ...]:
    """The next item, or nothing at the stream's end."""
    async for item in stream:
        return (item,)
    return ()
