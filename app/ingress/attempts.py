"""Attempts: submissions of requests to replicas, each to its end, and what comes after one that failed.

The life of an attempt, which is one submission of a request to one replica:

    book with the balancer → register → SUBMIT on the socket → Serve call ┐ refused by the engine → the reader's error
                                 │                                        │ replica dead, gone, full → next attempt
                                 └→ tokens on the socket ─────────────────┤ line lost, drained → next attempt
                                                                          └→ final record on the socket → finished

The replica begins with SUBMIT, or with the call if it cannot take that. Only the final record on the socket finishes a
request; the call's reply is at most a reason to expect that record (calls.py). An attempt that a replica has by SUBMIT
goes nowhere else: if Serve finds that replica full or gone, the request goes on in another attempt, which waits for its
call.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Iterable
from typing import Any

from app.balancer import Balancer
from app.balancer.booking import BookingGoneError
from app.balancer.terms import Refusal
from app.ingress.attempt import Attempt, ClientOptions
from app.ingress.call_errors import classify
from app.ingress.calls import Calls
from app.ingress.demand import Demand
from app.ingress.replica_links import ReplicaLinks
from app.ingress.request_journal import RequestJournal
from app.ingress.route_accounts import RouteAccounts
from app.ingress.submitting import Submitting
from app.telemetry.model_samples import RouteCounts
from app.transport.errors import FrameError
from app.transport.messages import StepRow, encode_abort, encode_stop
from engine.errors import EngineDeadError, OverloadedError, QuireError

logger = logging.getLogger("ray.serve")


class Attempts:
    """All attempts of one client that are under way. All on one event loop.

    Args:
        client_id: names the client to replicas and to the request router.
        demand: is told what requests have cost.
    """

    def __init__(
        self,
        model_id: str,
        client_id: str,
        balancer: Balancer,
        links: ReplicaLinks,
        options: ClientOptions,
        demand: Demand,
    ) -> None:
        self._model_id = model_id
        self._balancer = balancer
        self._links = links
        self._options = options
        self._attempts: dict[int, Attempt] = {}
        self._calls = Calls(client_id, options, self)
        self._routes = RouteAccounts(demand)
        self._submitting = Submitting(
            self._attempts, balancer, links, self._calls, self._routes, options.expected_output_tokens, self._refuse
        )

    @property
    def counts(self) -> RouteCounts:
        """What has become of its routes."""
        return self._routes.counts

    def __len__(self) -> int:
        return len(self._attempts)

    def call_by(self, generate: Any) -> None:
        """The handle's method that calls a replica; before the first `submit`."""
        self._calls.call_by(generate)

    def submit(self, journal: RequestJournal) -> None:
        """Begin a request, in the context of the HTTP request that runs now."""
        # Later attempts begin in callbacks of sockets; Serve must still see this request's context in their calls.
        self._submitting.submit(journal, contextvars.copy_context())

    def leave(self, journal: RequestJournal) -> None:
        """The request's reader has gone."""
        attempt = self._attempts.get(journal.attempt)
        if attempt is not None:
            if attempt.trace is not None:
                attempt.trace.left()
            self._give_up(attempt)

    def placed(self, number: int, replica_id: str | None, *, refused: bool) -> None:
        """The request router has asked, on a thread of its own, where an attempt goes.

        Raises:
            BookingGoneError: another replica has it already.
        """
        attempt = self._attempts.get(number)
        if attempt is None:
            return
        if attempt.trace is not None:
            attempt.trace.placed(replica_id, refused=refused)
        if attempt.submitted_to is not None and (refused or replica_id != attempt.submitted_to):
            attempt.turned_away = True
            raise BookingGoneError(number)

    def stop(self, journal: RequestJournal, index: int) -> None:
        """The reader needs no more of one sequence: its replica ends it, and so would any other."""
        attempt = self._attempts.get(journal.attempt)
        if attempt is None or not journal.stop(index):
            return
        at = self._balancer.replica_of(attempt.number)
        if at is not None:
            self._links.send(at, encode_stop(attempt.number, index))

    def expire(self) -> None:
        """Move what no replica has confirmed for too long."""
        for attempt in self._found(self._balancer.expire()):
            self._fail_over(attempt, "no replica has confirmed it")

    @property
    def num_without_replica(self) -> int:
        """Attempts that no replica has."""
        return sum(self._balancer.replica_of(number) is None for number in self._attempts)

    def fail_without_replica(self, error: QuireError) -> None:
        """End those that no replica has with an error: none can be expected."""
        for attempt in list(self._attempts.values()):
            if self.is_current(attempt) and self._balancer.replica_of(attempt.number) is None:
                self._end_with(attempt, error)

    def close(self) -> None:
        """End all of them with an error."""
        self._submitting.close()
        for attempt in list(self._attempts.values()):
            self._end_with(attempt, EngineDeadError("the ingress is shutting down"))

    # What the links tell

    def stepped(self, rows: Iterable[StepRow]) -> None:
        """A step's tokens. Rows of attempts that were given up are dropped here."""
        attempts = self._attempts
        for row in rows:
            attempt = attempts.get(row.attempt)
            if attempt is not None:
                self._take(attempt, row)

    def refused(self, numbers: Iterable[int]) -> None:
        """Their replica did not take them by socket: it will tell their calls why."""
        for attempt in self._found(numbers):
            self._calls.refused(attempt)

    def lost(self, numbers: Iterable[int], reason: str) -> None:
        """Their replica has gone."""
        for attempt in self._found(numbers):
            self._fail_over(attempt, reason)

    def leaving(self, numbers: Iterable[int], reason: str, *, only_waiting: bool) -> None:
        """Their replica leaves, but is well."""
        for attempt in self._found(numbers):
            if not (only_waiting and attempt.num_received):
                self._resubmit(attempt, reason, attempt.num_failures, attempt.excluded)

    def _found(self, numbers: Iterable[int]) -> list[Attempt]:
        return [self._attempts[number] for number in numbers if number in self._attempts]

    # What the calls tell

    def is_current(self, attempt: Attempt) -> bool:
        """Whether it is neither finished nor given up."""
        return self._attempts.get(attempt.number) is attempt

    def check_placed(self, attempt: Attempt) -> None:
        """It has had its time to find a replica."""
        if self.is_current(attempt) and self._balancer.replica_of(attempt.number) is None:
            waited_s = self._options.placement_timeout_s
            self._end_with(attempt, EngineDeadError(f"no replica of {self._model_id} was ready within {waited_s:g} s"))

    def final_record_missing(self, attempt: Attempt) -> None:
        """Its call has returned, and the final record has not come in time."""
        if self.is_current(attempt):
            self._fail_over(attempt, "its final record did not come")

    def call_cancelled(self, attempt: Attempt) -> None:
        """Serve has cancelled its call."""
        self._end_with(attempt, EngineDeadError("the request's call was cancelled"))

    def call_failed(self, attempt: Attempt, error: Exception) -> None:
        """Its call has raised."""
        if attempt.turned_away:
            reason = f"replica {attempt.submitted_to} did not take its call"
            self._resubmit(attempt, reason, attempt.num_failures, attempt.excluded, ahead=False)
            return
        failure = classify(error)
        at = self._balancer.replica_of(attempt.number)
        elsewhere = at is not None and self._balancer.has_alternative(at)
        if failure.verdict == "outage" or (failure.verdict == "overload" and elsewhere):
            self._fail_over(attempt, str(failure.error), at)
        else:
            if type(failure.error) is QuireError:
                logger.error("Model %s: a replica failed a request", self._model_id, exc_info=error)
            self._end_with(attempt, failure.error)

    # Tokens

    def _take(self, attempt: Attempt, row: StepRow) -> None:
        output, journal = row.output, attempt.journal
        if not 0 <= output.index < journal.request.sampling_params.n:
            raise FrameError(f"STEP names sequence {output.index} of {journal.request.sampling_params.n}")
        attempt.num_received += len(output.token_ids)
        if not attempt.prompt_computed:
            self._began(attempt, row)
        if output.finish_reason == "abort" and not journal.is_stopped(output.index):
            # Not asked for by us, or the attempt would be gone: the replica stops.
            self._resubmit(attempt, "the replica gave it up", attempt.num_failures, attempt.excluded)
        elif output.finish_reason == "error":
            self._fail_over(attempt, "the engine failed", self._balancer.replica_of(attempt.number))
        else:
            try:
                journal.add(output)
            except OverloadedError as error:
                self._end_with(attempt, error)
                return
            if row.final_count is not None:
                self._complete(attempt, row.final_count)

    def _began(self, attempt: Attempt, row: StepRow) -> None:
        """The first tokens: the prompt has been computed."""
        attempt.prompt_computed = True
        self._calls.first_token(attempt)
        if attempt.trace is not None:
            attempt.trace.began(row.output.num_cached_tokens)
        self._balancer.computed(attempt.number)
        hashing = self._links.hashing
        block_size = None if hashing is None else hashing[1]
        self._routes.began(attempt, row.output, self._balancer.receipt(attempt.number), block_size)

    # Ends

    def _complete(self, attempt: Attempt, final_count: int) -> None:
        if attempt.num_received != final_count:
            request_id = attempt.journal.request.request_id
            message = f"request {request_id}: {attempt.num_received} tokens came, the replica sent {final_count}"
            self._end_with(attempt, QuireError(message))
            return
        # The call returns on its own; nothing waits for it.
        self._forget(attempt)
        self._routes.ended(attempt)
        attempt.journal.finish()

    def _fail_over(self, attempt: Attempt, reason: str, failed_replica: str | None = None) -> None:
        """Go on elsewhere after a failure, unless there were too many."""
        num_failures = attempt.num_failures + 1
        if num_failures >= self._options.max_attempts:
            request_id = attempt.journal.request.request_id
            message = f"request {request_id} failed on {num_failures} replicas, the last time: {reason}"
            self._end_with(attempt, EngineDeadError(message))
            return
        excluded = attempt.excluded if failed_replica is None else attempt.excluded | {failed_replica}
        self._resubmit(attempt, reason, num_failures, excluded)

    def _resubmit(
        self, attempt: Attempt, reason: str, num_failures: int, excluded: frozenset[str], *, ahead: bool = True
    ) -> None:
        journal = attempt.journal
        if attempt.trace is not None:
            attempt.trace.failed(reason)
        self._give_up(attempt)
        if journal.sequences_finished:
            journal.finish()
            return
        self.counts.resubmitted += 1
        # Told by sockets, too: in the request's context the line has its ids. A copy, as its call may run in that now.
        attempt.context.copy().run(
            logger.info,
            "Request %s goes on elsewhere after %d tokens: %s",
            journal.request.request_id,
            journal.num_tokens,
            reason,
        )
        self._submitting.submit(journal, attempt.context, num_failures, excluded, ahead=ahead)

    def _refuse(self, attempt: Attempt, refusal: Refusal) -> None:
        """Admission has turned it away, at its arrival or later."""
        self._end_with(attempt, OverloadedError(refusal.message, refusal.retry_after_s))

    def _end_with(self, attempt: Attempt, error: QuireError) -> None:
        if attempt.trace is not None:
            attempt.trace.failed(str(error))
        self._give_up(attempt)
        attempt.journal.fail(error)

    def _give_up(self, attempt: Attempt) -> None:
        """Abort an attempt on its replica, by both roads: the socket is the faster, the call the surer."""
        # Once submitted it is there, wherever its booking may have moved.
        at = attempt.submitted_to or self._balancer.replica_of(attempt.number)
        self._forget(attempt)
        if at is not None:
            self._links.send(at, encode_abort((attempt.number,)))
        self._calls.cancel(attempt)

    def _forget(self, attempt: Attempt) -> None:
        self._attempts.pop(attempt.number, None)
        self._balancer.release(attempt.number)
        self._calls.drop(attempt)
        if attempt.trace is not None:
            attempt.trace.end()
