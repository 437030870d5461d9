"""Where an attempt begins: it is booked, told to its replica by socket where that is known, and called for later."""

from __future__ import annotations

import contextvars
import itertools
import time
from collections.abc import Callable

from app.balancer import Balancer
from app.balancer.terms import Refusal
from app.ingress.attempt import Attempt
from app.ingress.calls import Calls
from app.ingress.held_requests import HeldRequests
from app.ingress.replica_links import ReplicaLinks
from app.ingress.request_cost import request_cost
from app.ingress.request_journal import RequestJournal
from app.ingress.route_accounts import RouteAccounts
from app.telemetry.request_trace import AttemptTrace
from app.transport.submit_messages import Submission


class Submitting:
    """Makes attempts and sends them off. All on one event loop.

    Args:
        attempts: those under way by number, to which it adds.
        expected_output_tokens: what a request is taken to produce, if its `max_tokens` allows.
        refuse: is told of attempts that admission turns away, at their arrival or later.
    """

    def __init__(
        self,
        attempts: dict[int, Attempt],
        balancer: Balancer,
        links: ReplicaLinks,
        calls: Calls,
        routes: RouteAccounts,
        expected_output_tokens: int,
        refuse: Callable[[Attempt, Refusal], None],
    ) -> None:
        self._attempts = attempts
        self._balancer = balancer
        self._links = links
        self._calls = calls
        self._routes = routes
        self._expected_output_tokens = expected_output_tokens
        self._refuse = refuse
        self._held = HeldRequests(balancer, self._send_on, self._refuse_held)
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """Send on no more of what is held back."""
        self._held.close()

    def submit(
        self,
        journal: RequestJournal,
        context: contextvars.Context,
        num_failures: int = 0,
        excluded: frozenset[str] = frozenset(),
        *,
        ahead: bool = True,
    ) -> None:
        """Make an attempt at a request, and book it.

        Args:
            context: of the HTTP request, in which its call is made.
            num_failures: of its attempts so far.
            excluded: replicas that it is not to go to.
            ahead: whether its replica may have it by socket, before its call.
        """
        request = journal.resumed_request()
        attempt = Attempt(next(self._numbers), journal, request, context, num_failures, excluded)
        # Registered before the call: its first token may be here before the call knows that it was accepted.
        journal.attempt = attempt.number
        journal.num_attempts += 1
        if journal.trace is not None:
            attempt.trace = journal.trace.attempt(request.request_id, journal.num_attempts)
        self._attempts[attempt.number] = attempt
        placement = self._balancer.book(
            attempt.number,
            request_cost(request, self._expected_output_tokens, self._links.hashing),
            excluded,
            journal.terms,
            resumes=journal.num_attempts > 1,
        )
        outcome = self._routes.decided(placement)
        if attempt.trace is not None:
            self._trace_decision(attempt, attempt.trace, outcome)
        if placement.refusal is not None:
            self._refuse(attempt, placement.refusal)
        elif placement.held:
            self._held.watch()
        else:
            self._start(attempt, ahead=ahead)

    def _send_on(self, number: int) -> None:
        """What was held back has a replica now."""
        attempt = self._attempts.get(number)
        if attempt is not None:
            if attempt.trace is not None:
                self._trace_decision(attempt, attempt.trace, "placed")
            self._start(attempt)

    def _refuse_held(self, number: int, refusal: Refusal) -> None:
        attempt = self._attempts.get(number)
        if attempt is not None:
            self._refuse(attempt, refusal)

    def _start(self, attempt: Attempt, *, ahead: bool = True) -> None:
        attempt.waited_s = time.monotonic() - attempt.journal.began_s
        if attempt.trace is not None:
            attempt.trace.called()
        route = self._balancer.receipt(attempt.number) if ahead else None
        if route is not None:
            trace = attempt.trace.carrier if attempt.trace is not None else None
            submission = Submission(attempt.number, attempt.request, attempt.waited_s, trace, route.uncached_tokens)
            if self._links.submit(route.replica_id, submission):
                attempt.submitted_to = route.replica_id
                if attempt.trace is not None:
                    attempt.trace.placed(route.replica_id, refused=False)
                self._calls.start_later(attempt)
                return
        self._calls.start(attempt)

    def _trace_decision(self, attempt: Attempt, trace: AttemptTrace, outcome: str) -> None:
        trace.decided(outcome, self._balancer.receipt(attempt.number), self._balancer.num_available)
