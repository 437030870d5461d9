"""merge: all items, errors passed on, everything closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from app.ingress.merge import merge

pytestmark = pytest.mark.anyio


class Source:
    """Counts up, and tells whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = count
        self.error = error
        self.yielded = 0
        self.closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.count):
                await asyncio.sleep(0)
                self.yielded += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def test_all_items_come_in_each_streams_order() -> None:
    sources = [Source(5), Source(0), Source(3)]
    assert sorted([item async for item in merge([source.items() for source in sources])]) == [0, 0, 1, 1, 2, 2, 3, 4]
    assert all(source.closed for source in sources)


async def test_the_first_error_ends_all() -> None:
    sources = [Source(10_000), Source(1, ValueError("broken"))]
    with pytest.raises(ValueError, match="broken"):
        async for _ in merge([source.items() for source in sources]):
            pass
    assert all(source.closed for source in sources)
    assert sources[0].yielded < 100


async def test_closing_closes_all_and_nothing_runs_ahead() -> None:
    sources = [Source(10_000), Source(10_000)]
    merged = merge([source.items() for source in sources])
    await anext(merged)
    await asyncio.sleep(0.01)
    await merged.aclose()
    assert all(source.closed for source in sources)
    assert sum(source.yielded for source in sources) <= 5
