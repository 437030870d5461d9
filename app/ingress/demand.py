"""What an ingress is asked for of one model, told to its replicas in equal shares; autoscaling adds them up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from app.transport.demand_messages import DemandShare, encode_demand
from engine.request import EngineRequest

# Serve collects what replicas export about twice a second.
INTERVAL_S = 0.25
# Weight of one more request in the moving averages.
_WEIGHT = 0.02


class DemandLinks(Protocol):
    """The part of ReplicaLinks that demand needs."""

    @property
    def demand_takers(self) -> Sequence[str]:
        """Ids of the replicas that can take a request, and know the message."""
        ...

    def send(self, replica_id: str, data: bytes) -> None:
        """Send frames to a replica."""
        ...


class Demand:
    """Counts requests as they arrive, whatever becomes of them. All on one event loop.

    What a request will cost is not known at its arrival: of its prompt the share is taken that was not cached lately,
    and as many output tokens as requests have lately had, if its `max_tokens` allows.

    Args:
        expected_output_tokens: until requests have ended.
        queued_s: seconds of one replica's work that wait here now.
    """

    def __init__(self, links: DemandLinks, queued_s: Callable[[], float], expected_output_tokens: int) -> None:
        self._links = links
        self._queued_s = queued_s
        self._output_tokens_each = float(expected_output_tokens)
        self._uncached = 1.0
        self._come = DemandShare()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Tell as long as there is anybody to tell; on the running loop, whenever a replica has come. Idempotent."""
        if self._timer is None and not self._closed:
            self._tell()

    def close(self) -> None:
        """Tell no more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def arrived(self, request: EngineRequest) -> None:
        """A request has come."""
        params = request.sampling_params
        expected = self._output_tokens_each
        if params.max_tokens is not None:
            expected = min(expected, params.max_tokens)
        prompt_tokens, come = len(request.prompt_token_ids) * self._uncached, self._come
        self._come = DemandShare(
            requests=come.requests + 1.0,
            prompt_tokens=come.prompt_tokens + prompt_tokens,
            prompt_squares=come.prompt_squares + prompt_tokens * prompt_tokens,
            output_tokens=come.output_tokens + expected * params.n,
        )

    def computed(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A prompt has been computed, but for what was cached."""
        if prompt_tokens:
            self._uncached += (1.0 - cached_tokens / prompt_tokens - self._uncached) * _WEIGHT

    def ended(self, output_tokens: int, num_sequences: int) -> None:
        """A request has had its last token."""
        self._output_tokens_each += (output_tokens / num_sequences - self._output_tokens_each) * _WEIGHT

    def _tell(self) -> None:
        self._timer = None
        takers = self._links.demand_takers
        if not takers:
            # Kept for the first that comes up. Most deployments do not autoscale, and their ingresses rest.
            return
        self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self._tell)
        share, come = 1.0 / len(takers), self._come
        frame = encode_demand(
            DemandShare(
                share=share,
                requests=come.requests * share,
                prompt_tokens=come.prompt_tokens * share,
                prompt_squares=come.prompt_squares * share,
                output_tokens=come.output_tokens * share,
                queued_s=self._queued_s() * share,
            )
        )
        self._come = DemandShare()
        for replica_id in takers:
            self._links.send(replica_id, frame)
