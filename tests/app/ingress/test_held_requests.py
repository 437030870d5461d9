"""The timer over requests that are held back: whatever fails, it looks again."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from app.balancer.terms import Refusal
from app.ingress import held_requests
from app.ingress.held_requests import HeldRequests

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Holding:
    """In place of the balancer: one is held until a dispatch succeeds, the first of which fails."""

    def __init__(self) -> None:
        self.held = 1
        self.num_looks = 0

    def next_dispatch_s(self) -> float | None:
        return 0.0 if self.held else None

    def dispatch(self) -> list[int]:
        self.num_looks += 1
        if self.num_looks == 1:
            raise ZeroDivisionError("a fault of ours")
        self.held = 0
        return [7]

    def take_refused(self) -> list[tuple[int, Refusal]]:
        return []


async def test_a_fault_in_a_look_holds_nobody_for_ever(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(held_requests, "_FAULT_S", 0.01)
    holding: Any = Holding()
    sent: asyncio.Queue[int] = asyncio.Queue()
    held = HeldRequests(holding, sent.put_nowait, lambda *_: None)
    # Serve's logger does not propagate once Serve has set it up.
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        held.watch()
        async with asyncio.timeout(20):
            assert await sent.get() == 7
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
        held.close()
    assert "a fault of ours" in caplog.text
    assert holding.num_looks == 2
