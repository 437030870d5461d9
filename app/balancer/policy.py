"""How a replica is chosen among candidates: the seam for other policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from app.balancer.cost import ReplicaLoad, RequestCost, cost_s


class Policy(Protocol):
    """Chooses one of at least one candidates. Called under the balancer's lock: no I/O, no waiting."""

    def choose(self, request: RequestCost, candidates: Sequence[ReplicaLoad]) -> int:
        """The index of the candidate to book. Whatever it raises is logged, and the emptiest candidate taken."""
        ...


class CheapestPolicy:
    """The candidate of the least cost in seconds; of equals the one with the fewest bookings, then the first."""

    def choose(self, request: RequestCost, candidates: Sequence[ReplicaLoad]) -> int:
        costs = [(cost_s(request, load), load.num_bookings) for load in candidates]
        return min(range(len(candidates)), key=costs.__getitem__)


def default_policy() -> Policy:
    """The policy of a balancer that is given none."""
    return CheapestPolicy()
