"""How a replica is chosen: the seam for policies, and the one that the balancer uses unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple, Protocol

from app.balancer.cost import CostWeights, RequestCost, cost_s
from app.balancer.fleet import Fleet
from app.balancer.load_order import LoadOrder
from app.balancer.prefix_index import slots_of

# Where more than MAX_SORTED replicas hold equally much, so many of the emptiest are priced of either lane.
MAX_PRICED = 3
MAX_SORTED = 12
# So many are gone through one by one; among more, the fleet's order comes upon one soon enough.
MAX_LISTED = 160

# Prompts that take this many times the mean are long. Leaving the lanes costs a long one, and a short one, so many
# means: enough to keep them apart while there is a choice, and little beside a queue.
MIN_REPLICAS_FOR_LANES = 4
LONG_PROMPT = 3.2
LONG_OUT_OF_LANE = 1.05
SHORT_OUT_OF_LANE = 0.07

# Weight of a new prompt in their mean.
_WEIGHT = 0.01


class Choice(NamedTuple):
    """A replica for a request. `cost_s` is in the policy's own unit, seconds for those that have one."""

    slot: int
    num_cached_blocks: int
    cost_s: float


class Policy(Protocol):
    """Chooses among at least one replica. Called under the balancer's lock: no I/O, no waiting."""

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        """The replica to book, one of the bitmap `among`. Whatever it raises is logged, and the emptiest one taken."""
        ...

    def placed(self, prefill_s: float) -> None:
        """A request was sent where this policy chose, with so many seconds of prompt to compute there."""
        ...


class CheapestPolicy:
    """The replica of the least cost in seconds; of equals the one that has been idle for longest.

    Replicas that hold equally much of the prompt, and all have its adapter or all lack it, are visited from the
    emptiest on, until waiting alone costs more than the best found. So a decision prices the holders and a few others,
    however many replicas there are.

    In a fleet of some size, every other replica is the lane of long prompts, and the short ones stay out of it while
    that costs them next to nothing. A prompt that takes many times the mean blocks whoever comes back to its replica;
    in lanes it mostly meets its like.
    """

    def __init__(self, weights: CostWeights | None = None) -> None:
        self.weights = weights or CostWeights()
        self._mean_prefill_s = 0.0

    def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
        best: Choice | None = None
        weights = self.weights._replace(crowding=self.crowding(fleet))
        # Of many alike only the emptiest are priced: those that have the adapter, and those that have not.
        has_adapter = fleet.adapters.holders(request.adapter) if request.adapter else 0
        for num_blocks, holders in fleet.overlaps(request, among):
            for alike in (holders & has_adapter, holders & ~has_adapter):
                if alike:
                    best = self._cheapest_of(alike, num_blocks, request, fleet, weights, best)
        assert best is not None, "there is a replica to choose"
        return best

    def placed(self, prefill_s: float) -> None:
        """A request was sent on its way, with so many seconds of prompt to compute."""
        weight = _WEIGHT if self._mean_prefill_s else 1.0
        self._mean_prefill_s += weight * (prefill_s - self._mean_prefill_s)

    def crowding(self, fleet: Fleet) -> float:
        """Its weight as things are: of each second of work, every request held back waits one part in so many replicas
        longer."""
        return self.weights.crowding + fleet.num_held / len(fleet)

    def lane_mean_s(self, fleet: Fleet) -> float:
        """Mean seconds of a prompt, by which lanes are made; 0 where there are too few replicas for lanes."""
        return self._mean_prefill_s if len(fleet) >= MIN_REPLICAS_FOR_LANES else 0.0

    def _cheapest_of(
        self,
        holders: int,
        num_blocks: int,
        request: RequestCost,
        fleet: Fleet,
        weights: CostWeights,
        best: Choice | None,
    ) -> Choice | None:
        uncached = request.uncached_tokens(num_blocks)
        mean_s = self.lane_mean_s(fleet)
        crowding = 1.0 + weights.crowding
        for slot in _emptiest(holders, fleet):
            wait_s = max(fleet.free_at[slot] - fleet.now, 0.0)
            prefill_s = uncached / fleet.prefill_rates[slot]
            is_long = prefill_s > LONG_PROMPT * mean_s
            lane_s = 0.0
            if is_long != bool(slot & 1):
                lane_s = mean_s * (LONG_OUT_OF_LANE if is_long else SHORT_OUT_OF_LANE)
            if best is not None:
                if wait_s >= best.cost_s:
                    break
                if wait_s + prefill_s * crowding + lane_s >= best.cost_s:
                    continue
            cost = cost_s(request, fleet.load_of(slot, request.adapter), num_blocks, weights) + lane_s
            if best is None or cost < best.cost_s:
                best = Choice(slot, num_blocks, cost)
        return best


def _emptiest(holders: int, fleet: Fleet) -> list[int]:
    """Slots of a bitmap from the emptiest on; of many, MAX_PRICED of either lane."""
    slots = slots_of(holders) if holders.bit_count() <= MAX_LISTED else None
    if slots is None:
        slots = [slot for parity in (0, 1) for slot in _first_in_lane(holders, fleet, parity)]
    elif len(slots) > MAX_SORTED:
        lanes = ([slot for slot in slots if slot & 1 == parity] for parity in (0, 1))
        slots = [slot for lane in lanes for slot in nsmallest(MAX_PRICED, lane, key=fleet.free_at.__getitem__)]
    slots.sort(key=lambda slot: (fleet.free_at[slot], slot))
    return slots


def _first_in_lane(holders: int, fleet: Fleet, parity: int) -> Iterator[int]:
    """The emptiest of many, found by the order of the whole fleet, of which they are a good part."""
    assert isinstance(fleet.order, LoadOrder), "policies in Python read the order in Python"
    bits = holders.to_bytes(holders.bit_length() // 8 + 1, "little")
    end = 8 * len(bits)
    matching = (slot for _, slot in fleet.order.lane(parity) if slot < end and bits[slot >> 3] >> (slot & 7) & 1)
    return islice(matching, MAX_PRICED)
