"""A request's claim on a replica, from its arrival to its end."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import NamedTuple

from app.balancer.cost import RequestCost
from app.balancer.terms import DEFAULT_TERMS, Refusal, RequestTerms


class BookingGoneError(KeyError):
    """The booking was released or has expired: its request has ended or moved on."""


class Placement(NamedTuple):
    """Where a booking stands.

    Attributes:
        replica_id: None while no replica can take it, or while it is held.
        held: it waits in the balancer, which places it later, in `dispatch`.
        refusal: it is booked no more; its client is to be told.
    """

    replica_id: str | None
    num_moves: int
    held: bool = False
    refusal: Refusal | None = None


class RouteReceipt(NamedTuple):
    """What a choice rested on: for the client that asks why its request went where it did.

    `uncached_tokens` are those of the prompt that are left to compute.
    Of the cost, `wait_s` is for prompts queued before it, `prefill_s` for its own and `adapter_s` for its adapter; the
    rest is what it takes from others: see `cost.cost_s`.
    """

    replica_id: str
    cached_tokens: int
    wait_s: float
    cost_s: float
    adapter_s: float = 0.0
    prefill_s: float = 0.0
    uncached_tokens: int = 0


@dataclass(slots=True)
class Booking:
    """`reported`: the replica's own numbers include it by now. `is_expected`: blocks are announced on its behalf.
    `wanted_slot`: where it would have been placed, were it not held. `slot`: where it was, if `replica_id` is set.
    `packed_hashes`: the block hashes as the native core takes them.

    For admission: `resumes`: a replica had begun it. `promised`: it was told to come now. `deadline_at`: its first
    token is due. `turn`: its place in its class, once its turn has come (fair_queue.py). `work_s` (replica-seconds) and
    `num_tokens` (uncached prompt and expected output) are what it is reckoned to cost.
    """

    key: int
    cost: RequestCost
    excluded: frozenset[str]
    arrived_at: float
    booked_at: float
    replica_id: str | None = None
    slot: int = -1
    num_cached_blocks: int = 0
    predicted_wait_s: float = 0.0
    predicted_cost_s: float = 0.0
    prefill_s: float = 0.0
    predicted_adapter_s: float = 0.0
    wanted_slot: int = -1
    reported: bool = False
    held: bool = False
    num_moves: int = 0
    refused_by: frozenset[str] = frozenset()
    is_expected: bool = False
    packed_hashes: array[int] | None = None
    terms: RequestTerms = DEFAULT_TERMS
    resumes: bool = False
    promised: bool = False
    deadline_at: float = math.inf
    turn: float = 0.0
    work_s: float = 0.0
    num_tokens: float = 0.0

    @property
    def uncached_tokens(self) -> int:
        """Prompt tokens that its replica has yet to compute, as far as is known."""
        return self.cost.uncached_tokens(self.num_cached_blocks)

    @property
    def num_new_blocks(self) -> int:
        """Blocks that its prompt takes beyond those cached."""
        return -(-self.cost.prompt_tokens // self.cost.block_size) - self.num_cached_blocks

    def receipt(self) -> RouteReceipt | None:
        """None while it is placed nowhere."""
        if self.replica_id is None:
            return None
        cached = min(self.num_cached_blocks * self.cost.block_size, self.cost.prompt_tokens - 1)
        return RouteReceipt(
            self.replica_id,
            cached,
            self.predicted_wait_s,
            self.predicted_cost_s,
            self.predicted_adapter_s,
            self.prefill_s,
            self.uncached_tokens,
        )
