"""What replicas are told of demand adds up to what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from app.ingress import demand as demand_module
from app.ingress.demand import Demand
from app.transport.demand_messages import DemandShare, decode_demand
from app.transport.frames import FrameDecoder
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand_module, "INTERVAL_S", 0.01)


class Links:
    def __init__(self, *takers: str) -> None:
        self.demand_takers = list(takers)
        self.told: dict[str, list[DemandShare]] = {}

    def send(self, replica_id: str, data: bytes) -> None:
        self.told.setdefault(replica_id, []).extend(decode_demand(frame) for frame in FrameDecoder().feed(data))

    def total(self, name: str) -> float:
        return sum(float(getattr(share, name)) for shares in self.told.values() for share in shares)


def request(num_prompt: int, max_tokens: int | None = None, n: int = 1) -> EngineRequest:
    return EngineRequest("r", list(range(num_prompt)), SamplingParams(max_tokens=max_tokens, n=n))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(3):
        while not condition():  # noqa: ASYNC110 - told by a timer
            await asyncio.sleep(0.002)


async def test_shares_add_up_to_the_whole_and_nothing_is_told_twice() -> None:
    links = Links("x", "y", "z")
    demand = Demand(links, lambda: 6.0, expected_output_tokens=100)
    demand.arrived(request(90, max_tokens=30, n=2))
    demand.arrived(request(30))
    demand.start()
    await until(lambda: all(len(links.told.get(name, [])) > 3 for name in links.demand_takers))
    demand.close()
    assert links.total("requests") == pytest.approx(2.0)
    assert links.total("prompt_tokens") == pytest.approx(120.0)
    assert links.total("prompt_squares") == pytest.approx(90**2 + 30**2)
    assert links.total("output_tokens") == pytest.approx(160.0)
    for shares in links.told.values():
        assert shares[-1].queued_s == pytest.approx(2.0)
        assert shares[-1].share == pytest.approx(1 / 3)


async def test_what_comes_while_nobody_runs_is_told_to_the_first_that_does() -> None:
    links = Links()
    demand = Demand(links, lambda: 0.0, 100)
    demand.start()
    demand.arrived(request(50))
    await asyncio.sleep(0.03)
    assert not links.told
    links.demand_takers.append("first")
    demand.start()
    await until(lambda: links.told)
    assert links.told["first"][0].prompt_tokens == 50.0
    links.demand_takers.clear()
    demand.arrived(request(20))
    await asyncio.sleep(0.03)
    links.demand_takers.append("second")
    demand.start()
    demand.start()
    demand.close()
    demand.start()
    assert [share.prompt_tokens for share in links.told["second"]] == [20.0]


async def test_no_timer_runs_while_nobody_wants_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[object] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def counted(delay: float, callback: Callable[..., object], *args: object) -> asyncio.TimerHandle:
        timers.append(callback)
        return call_later(delay, callback, *args)

    monkeypatch.setattr(loop, "call_later", counted)
    links = Links()
    demand = Demand(links, lambda: 0.0, 100)
    demand.start()
    demand.arrived(request(50))
    assert not timers
    links.demand_takers.append("x")
    demand.start()
    demand.start()
    assert len(timers) == 1
    demand.close()


async def test_cached_prompts_and_short_answers_are_expected_again() -> None:
    links = Links("x")
    demand = Demand(links, lambda: 0.0, 100)
    for _ in range(400):
        demand.computed(200, 150)
        demand.ended(40, 2)
    demand.arrived(request(100))
    demand.start()
    demand.close()
    (share,) = links.told["x"]
    assert share.prompt_tokens == pytest.approx(25.0, rel=0.02)
    assert share.output_tokens == pytest.approx(20.0, rel=0.02)
