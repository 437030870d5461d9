"""Other balancers' policies, to compare with and to choose by configuration. Each names where it comes from.

They see what the balancer sees: booked work at once, and an exact index of prefixes. So a comparison is of how replicas
are chosen, not of how well the chooser is informed.
"""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt

from app.balancer.cost import RequestCost
from app.balancer.fleet import Fleet
from app.balancer.policy import Choice
from app.balancer.prefix_index import slots_of

FloatArray = npt.NDArray[np.float64]


class _Memoryless:
    """What becomes of a choice does not matter to these."""

    def placed(self, prefill_s: float) -> None:
        pass


class RoundRobinPolicy(_Memoryless):
    """Each in turn."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        after = among >> (self._last + 1) << (self._last + 1)
        turn = after or among
        self._last = (turn & -turn).bit_length() - 1
        return Choice(self._last, _cached_at(self._last, request, fleet), 0.0)


class PowerOfTwoPolicy(_Memoryless):
    """The one with fewer requests of two drawn at random: Ray Serve's default."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        slots = slots_of(among)
        pair = self._random.sample(slots, min(2, len(slots)))
        slot = min(pair, key=fleet.num_sequences.__getitem__)
        return Choice(slot, _cached_at(slot, request, fleet), float(fleet.num_sequences[slot]))


class LeastTokensPolicy(_Memoryless):
    """The fewest prompt tokens queued, whatever is cached."""

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        slot = fleet.emptiest(among)
        return Choice(slot, _cached_at(slot, request, fleet), max(fleet.free_at[slot] - fleet.now, 0.0))


class PrefixThresholdPolicy(_Memoryless):
    """The longest match if it is long enough and load is even: SGLang's and Ray's prefix routers.

    Args:
        imbalance: requests by which the fullest may exceed the emptiest before load alone decides.
        match: share of the prompt that must be cached for a match to count; else the shortest queue is taken.
    """

    def __init__(self, imbalance: int = 10, match: float = 0.1) -> None:
        self._imbalance = imbalance
        self._match = match

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        slots = slots_of(among)
        queues = [fleet.num_sequences[slot] for slot in slots]
        if max(queues) - min(queues) > self._imbalance:
            slot = slots[queues.index(min(queues))]
            return Choice(slot, _cached_at(slot, request, fleet), float(min(queues)))
        deepest = fleet.overlaps(request, among)[0]
        if deepest.num_blocks * request.block_size >= self._match * request.prompt_tokens:
            slot = min(slots_of(deepest.holders), key=fleet.num_sequences.__getitem__)
            return Choice(slot, deepest.num_blocks, 0.0)
        slot = slots[queues.index(min(queues))]
        return Choice(slot, _cached_at(slot, request, fleet), float(min(queues)))


class PendingPlusMissPolicy(_Memoryless):
    """Uncached prompt tokens queued plus the request's own: Llumnix v1 (2026) without its load terms.

    Priced for every replica at once; of equals the one that has been idle for longest.
    """

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        free_at = np.frombuffer(fleet.free_at)
        rates = np.frombuffer(fleet.prefill_rates)
        uncached = np.full(len(free_at), request.uncached_tokens(0), dtype=np.float64)
        out = np.ones(len(free_at), dtype=bool)
        groups = fleet.overlaps(request, among)
        for num_blocks, holders in groups:
            slots = slots_of(holders)
            uncached[slots] = request.uncached_tokens(num_blocks)
            out[slots] = False
        pending = np.maximum(free_at - fleet.now, 0.0) * rates + uncached
        price = self._price(pending, fleet)
        price[out] = np.inf
        cheapest = np.flatnonzero(price == price.min())
        slot = int(cheapest[np.argmin(free_at[cheapest])])
        num_blocks = next(group.num_blocks for group in groups if group.holders >> slot & 1)
        return Choice(slot, num_blocks, float(price[slot]))

    def _price(self, pending: FloatArray, fleet: Fleet) -> FloatArray:
        """Of each slot; `pending` are the uncached prompt tokens there, the request's own included."""
        del fleet
        return pending


class LMetricPolicy(PendingPlusMissPolicy):
    """Those tokens times the requests there would then be (arXiv 2603.15202)."""

    def _price(self, pending: FloatArray, fleet: Fleet) -> FloatArray:
        return pending * (np.frombuffer(fleet.num_sequences, dtype=np.int64) + 1)


class DynamoLinearPolicy(PendingPlusMissPolicy):
    """Prompt tokens queued and own, less those cached, plus tokens of running requests: NVIDIA Dynamo's default.

    Dynamo counts both in blocks; one block size being common to all, tokens give the same order.
    """

    def _price(self, pending: FloatArray, fleet: Fleet) -> FloatArray:
        return pending + np.frombuffer(fleet.running_tokens)


def _cached_at(slot: int, request: RequestCost, fleet: Fleet) -> int:
    return fleet.overlaps(request, 1 << slot)[0].num_blocks
