from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from app.balancer.reservations import News
from app.ingress import promise_exchange
from app.ingress.promise_exchange import NewsByModel, PromiseExchange

pytestmark = pytest.mark.anyio


class Client:
    def __init__(self) -> None:
        self.news = News([], [])
        self.heard: list[News] = []

    def take_promises(self) -> News:
        taken, self.news = self.news, News([], [])
        return taken

    def hear_promises(self, news: News) -> None:
        self.heard.append(news)


class Ingresses:
    """Two of them, both with a model."""

    def __init__(self) -> None:
        self.clients = {"a": Client(), "b": Client()}
        self.exchanges = {name: self._exchange(name, client) for name, client in self.clients.items()}
        self.num_broadcasts = 0
        self.fails = False

    def _exchange(self, name: str, client: Client) -> PromiseExchange:
        def clients() -> Mapping[str, Client]:
            return {"model": client}

        return PromiseExchange(name, clients, self._broadcast)

    async def _broadcast(self, ingress_id: str, news: NewsByModel) -> None:
        self.num_broadcasts += 1
        if self.fails:
            raise RuntimeError("nobody there")
        for exchange in self.exchanges.values():
            exchange.hear(ingress_id, {**news, "gone": News([], [1])})


@pytest.fixture
def ingresses(monkeypatch: pytest.MonkeyPatch) -> Ingresses:
    monkeypatch.setattr(promise_exchange, "INTERVAL_S", 0.005)
    return Ingresses()


async def test_the_others_are_told_and_only_if_there_is_news(ingresses: Ingresses) -> None:
    news = News([(7, "tenant", 3.0, 6.0, 0.5)], [9])
    for exchange in ingresses.exchanges.values():
        exchange.start()
    await asyncio.sleep(0.05)
    assert ingresses.num_broadcasts == 0
    ingresses.clients["a"].news = news
    await asyncio.sleep(0.05)
    assert ingresses.num_broadcasts == 1
    assert ingresses.clients["b"].heard == [news]
    assert ingresses.clients["a"].heard == []


async def test_a_failure_is_survived(ingresses: Ingresses, caplog: pytest.LogCaptureFixture) -> None:
    ingresses.exchanges["a"].start()
    ingresses.fails = True
    ingresses.clients["a"].news = News([], [1])
    await asyncio.sleep(0.05)
    ingresses.fails = False
    ingresses.clients["a"].news = News([], [2])
    await asyncio.sleep(0.05)
    assert ingresses.clients["b"].heard == [News([], [2])]
    assert "nobody there" in caplog.text
