"""What has become of routes: counted for `/metrics`, told in receipts, and learned from for the demand."""

from __future__ import annotations

from app.balancer import Placement, RouteReceipt
from app.ingress.attempt import Attempt
from app.ingress.demand import Demand
from app.telemetry.model_samples import RouteCounts
from engine.outputs import SequenceOutput


class RouteAccounts:
    """Of one client. All on one event loop.

    Args:
        demand: is told what requests have cost.
    """

    def __init__(self, demand: Demand) -> None:
        self._demand = demand
        self.counts = RouteCounts()

    def decided(self, placement: Placement) -> str:
        """The balancer has decided on an attempt; returns the outcome's name."""
        if placement.refusal is not None:
            return "refused"
        if placement.held:
            self.counts.held += 1
            return "held"
        if placement.replica_id is None:
            self.counts.unplaced += 1
            return "unplaced"
        self.counts.placed += 1
        return "placed"

    def began(
        self, attempt: Attempt, output: SequenceOutput, route: RouteReceipt | None, block_size: int | None
    ) -> None:
        """Its first tokens are here.

        Args:
            route: what its choice rested on; None if it was not placed by the balancer.
            block_size: of the replicas' prefix caches, if they hash prompts.
        """
        journal = attempt.journal
        if journal.num_attempts == 1:
            self._demand.computed(len(journal.request.prompt_token_ids), output.num_cached_tokens)
            if route is not None:
                self._count(route.cached_tokens, output.num_cached_tokens, block_size)
        receipt = journal.receipt
        if receipt is not None:
            receipt.placed(route, journal.num_attempts)
            receipt.cached_tokens = output.num_cached_tokens
            receipt.request_class, receipt.queued_s = journal.terms.class_name, attempt.waited_s
            receipt.wait_s = max(0.0, output.waited_s - attempt.waited_s)

    def ended(self, attempt: Attempt) -> None:
        """Its request has had its last token."""
        journal = attempt.journal
        self._demand.ended(journal.num_tokens, journal.request.sampling_params.n)

    def _count(self, expected_cached_tokens: int, cached_tokens: int, block_size: int | None) -> None:
        self.counts.expected_cached_tokens += expected_cached_tokens
        # Less than a block is a cap on a hit: a token at least is computed.
        if block_size is not None and expected_cached_tokens - cached_tokens >= block_size:
            self.counts.wrong += 1
