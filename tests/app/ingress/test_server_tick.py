"""A server with the slow tick serves, dates its answers, and exits when told."""

from __future__ import annotations

import asyncio
from email.utils import parsedate_to_datetime

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette

from app.ingress import server_tick

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uvicorn.Server, "main_loop", uvicorn.Server.main_loop)
    monkeypatch.setattr(server_tick, "INTERVAL_S", 0.05)
    server_tick.slow_down()


async def test_a_server_dates_its_answers_and_exits_when_told() -> None:
    server = uvicorn.Server(uvicorn.Config(Starlette(), port=0, lifespan="off", log_config=None))
    ticks: list[int] = []
    on_tick = server.on_tick

    async def counted(counter: int) -> bool:
        ticks.append(counter)
        return await on_tick(counter)

    server.on_tick = counted  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started or len(ticks) < 3:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        async with httpx2.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/nowhere")
        assert answer.status_code == 404
        assert parsedate_to_datetime(answer.headers["date"]).year >= 2026
        server.should_exit = True
        await serving
    assert all(tick % 10 == 0 for tick in ticks)
    assert ticks[:3] == [0, 10, 20]
