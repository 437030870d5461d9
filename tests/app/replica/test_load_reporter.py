"""The load is told when it changes: soon, together with a step's tokens where there are any, and never for nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from app.replica.block_log import BlockLog
from app.replica.load_reporter import GROWTH_INTERVAL_S, MIN_INTERVAL_S, LoadReporter
from app.transport.frames import Frame, FrameDecoder
from app.transport.messages import Kind, decode_load, encode_abort
from engine.outputs import EngineStats

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A server that keeps what is written, and an engine whose numbers the test sets."""

    def __init__(self) -> None:
        self.writes: list[tuple[float, str, list[Frame]]] = []
        self.subscribers = ("left", "right")
        self.stats = EngineStats(100, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        server: Any = self
        self.reporter = LoadReporter(lambda: self.stats, server, BlockLog())
        for name in self.subscribers:
            self.reporter.subscribed(name)
        self.reporter.send_with({})
        self.writes.clear()

    def send(self, ingress_id: str, data: bytes) -> None:
        self.writes.append((time.monotonic(), ingress_id, list(FrameDecoder().feed(data))))

    def call_later(self, delay_s: float, callback: Callable[..., None], *args: object) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, callback, *args)

    def step(self, **changes: Any) -> None:
        self.stats = replace(self.stats, num_steps=self.stats.num_steps + 1, **changes)
        self.reporter.send_with({})

    @property
    def num_loads(self) -> int:
        return sum(frame.kind == Kind.LOAD for _, name, frames in self.writes for frame in frames if name == "left")


async def test_nothing_is_said_while_nothing_happens() -> None:
    world = World()
    world.reporter.send_with({})
    await asyncio.sleep(2 * GROWTH_INTERVAL_S)
    assert world.writes == []


async def test_a_change_of_the_queue_is_told_at_once_and_others_are_gathered() -> None:
    world = World()
    await asyncio.sleep(2 * MIN_INTERVAL_S)
    world.step(num_waiting=1)
    assert world.num_loads == 1
    for number in range(2, 6):
        world.step(num_waiting=number)
    assert world.num_loads == 1
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    assert world.num_loads == 2
    assert decode_load(world.writes[-1][2][0]).num_waiting == 5


async def test_growth_alone_is_told_less_often() -> None:
    world = World()
    began = time.monotonic()
    number = 0
    while time.monotonic() - began < 4 * GROWTH_INTERVAL_S:
        number += 1
        world.step(num_running_tokens=number)
        await asyncio.sleep(0.002)
    # Once an interval, and perhaps once at the beginning.
    assert 1 <= world.num_loads <= 5
    await asyncio.sleep(2 * GROWTH_INTERVAL_S)
    assert decode_load(world.writes[-1][2][-1]).num_running_tokens == number


async def test_a_load_that_is_due_goes_along_with_the_tokens_in_one_write() -> None:
    world = World()
    await asyncio.sleep(2 * MIN_INTERVAL_S)
    world.stats = replace(world.stats, num_steps=1, num_running=1)
    world.reporter.send_with({"left": encode_abort([7])})
    assert [(name, [frame.kind for frame in frames]) for _, name, frames in world.writes] == [
        ("left", [Kind.ABORT, Kind.LOAD]),
        ("right", [Kind.LOAD]),
    ]


async def test_tokens_do_not_wait_for_a_load_that_is_not_due() -> None:
    world = World()
    world.stats = replace(world.stats, num_steps=1, num_running_tokens=1)
    world.reporter.send_with({"left": encode_abort([7])})
    assert [(name, [frame.kind for frame in frames]) for _, name, frames in world.writes] == [("left", [Kind.ABORT])]


async def test_an_admission_is_confirmed_by_the_first_step_after_it() -> None:
    world = World()
    await asyncio.sleep(2 * MIN_INTERVAL_S)
    world.reporter.admitted("left", 7, num_steps=world.stats.num_steps)
    world.reporter.admitted("gone", 8, num_steps=0)
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    assert world.num_loads == 0
    world.step()
    assert world.num_loads == 1
    loads = {name: decode_load(frames[0]) for _, name, frames in world.writes}
    assert loads["left"].admitted == (7,)
    assert loads["right"].admitted == ()


async def test_others_are_told_at_once_of_a_prompt_that_no_step_has_taken_in() -> None:
    world = World()

    def tokens() -> dict[str, int]:
        loads = {name: decode_load(frames[-1]) for _, name, frames in world.writes}
        return {name: load.num_waiting_tokens for name, load in loads.items()}

    await asyncio.sleep(2 * MIN_INTERVAL_S)
    world.reporter.admitted("left", 7, world.stats.num_steps, 300)
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    assert tokens() == {"left": 0, "right": 300}, "its own ingress counts it until it is confirmed"
    world.step(num_waiting_tokens=280)
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    assert tokens() == {"left": 280, "right": 280}


async def test_a_prompt_that_is_given_up_before_a_step_is_waited_for_no_more() -> None:
    world = World()
    await asyncio.sleep(2 * MIN_INTERVAL_S)
    world.reporter.admitted("left", 7, world.stats.num_steps, 300)
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    world.reporter.ended("left", 7)
    world.reporter.ended("left", 8)
    await asyncio.sleep(4 * MIN_INTERVAL_S)
    last = {name: decode_load(frames[-1]) for _, name, frames in world.writes}
    assert last["right"].num_waiting_tokens == last["right"].num_waiting == 0
