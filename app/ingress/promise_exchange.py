"""What ingresses tell one another of refused requests, which may come back to another than that which refused them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from app.balancer.reservations import News

logger = logging.getLogger("ray.serve")

# Nobody is told to come again sooner than in a second.
INTERVAL_S = 0.4
_TIMEOUT_S = 2.0

# News by the id of its model.
NewsByModel = Mapping[str, News]


class PromisingClient(Protocol):
    """The part of ReplicaSetClient that has promises."""

    def take_promises(self) -> News:
        """What others should know, since the last call."""
        ...

    def hear_promises(self, news: News) -> None:
        """What another has told."""
        ...


class PromiseExchange:
    """Tells the other ingresses as long as there is news. On one event loop.

    Args:
        ingress_id: names this ingress, which hears itself too.
        clients: of the models that are served now, by id.
        broadcast: calls `hear` of all ingresses.
    """

    def __init__(
        self,
        ingress_id: str,
        clients: Callable[[], Mapping[str, PromisingClient]],
        broadcast: Callable[[str, NewsByModel], Awaitable[object]],
    ) -> None:
        self._ingress_id = ingress_id
        self._clients = clients
        self._broadcast = broadcast
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for news from now on; on the running loop, once."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="promise exchange")

    def hear(self, ingress_id: str, news: NewsByModel) -> None:
        """What an ingress tells all."""
        if ingress_id == self._ingress_id:
            return
        clients = self._clients()
        for model_id, told in news.items():
            if model_id in clients:
                clients[model_id].hear_promises(News(*told))

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                taken = {model_id: client.take_promises() for model_id, client in self._clients().items()}
                news = {model_id: told for model_id, told in taken.items() if told.made or told.kept}
                if not news:
                    continue
                async with asyncio.timeout(_TIMEOUT_S):
                    await self._broadcast(self._ingress_id, news)
            except Exception as error:
                # Who comes back to another ingress then waits like anybody else.
                logger.warning("the other ingresses were not told of refused requests: %s", error)
