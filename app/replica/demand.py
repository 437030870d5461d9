"""This replica's share of the demand for its model, as the ingresses tell it."""

from __future__ import annotations

from typing import NamedTuple

from app.transport.demand_messages import DemandShare


class DemandTotals(NamedTuple):
    """What a replica exports of demand.

    Attributes:
        requests, prompt_tokens, prompt_squares, output_tokens: offered to it since it started; they only grow.
        queued_s: seconds of one replica's work that wait in ingresses now, its share of them.
        shares: sum of the ingresses' shares; over all replicas it is the number of ingresses, but for the moment in
            which one of the replicas is new.
        num_ingresses: those connected here that tell their demand.
    """

    requests: float
    prompt_tokens: float
    prompt_squares: float
    output_tokens: float
    queued_s: float
    shares: float
    num_ingresses: int


class Demand:
    """Adds up the shares. On the server's thread, but for `totals`, which any thread may ask for."""

    def __init__(self) -> None:
        self._latest: dict[str, DemandShare] = {}
        self.totals = DemandTotals(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0)

    def told(self, ingress_id: str, share: DemandShare) -> None:
        """An ingress tells what has come since."""
        self._latest[ingress_id] = share
        self._sum(share)

    def gone(self, ingress_id: str) -> None:
        """An ingress has gone, and what waited there with it."""
        if self._latest.pop(ingress_id, None) is not None:
            self._sum(DemandShare())

    def _sum(self, news: DemandShare) -> None:
        last, latest = self.totals, self._latest.values()
        # One assignment, so that a reader on another thread sees numbers of one moment.
        self.totals = DemandTotals(
            last.requests + news.requests,
            last.prompt_tokens + news.prompt_tokens,
            last.prompt_squares + news.prompt_squares,
            last.output_tokens + news.output_tokens,
            sum(share.queued_s for share in latest),
            sum(share.share for share in latest),
            len(latest),
        )
