"""Several asynchronous generators read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merge(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Yield the items of all streams as they come; the first error ends them all.

    Closing this generator closes every stream. No stream runs ahead of the reader by more than one item, and none
    starves another. An item costs the same however many streams there are.
    """
    waiting: dict[asyncio.Task[tuple[Item, ...]], AsyncGenerator[Item, None]] = {}
    ready: asyncio.Queue[asyncio.Task[tuple[Item, ...]]] = asyncio.Queue()

    def read(stream: AsyncGenerator[Item, None]) -> None:
        task = asyncio.create_task(_next(stream))
        task.add_done_callback(ready.put_nowait)
        waiting[task] = stream

    try:
        for stream in streams:
            read(stream)
        while waiting:
            task = await ready.get()
            for item in task.result():
                yield item
                read(waiting[task])
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
