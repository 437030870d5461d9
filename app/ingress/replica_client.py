"""ReplicaSetClient: a ModelClient over the replicas of one engine deployment.

The life of an attempt, which is one submission of a request to one replica:

    book with the balancer → register → Serve call ──────────────┐ refused by the engine → the reader gets the error
                                 │                               │ replica dead, gone, engine failed → next attempt
                                 └→ tokens on the socket ────────┤ line lost, drained → next attempt
                                                                 └→ final record on the socket → finished

Only the final record on the socket finishes a request. The Serve call exists so that Serve counts, cancels and drains
it; its reply is at most a reason to expect that record. Everything runs on one event loop but `place` and
`replicas_changed`, which the request router calls from its thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from app.balancer import Balancer, Placement, RequestCost
from app.balancer.registry import ReplicaInfo, deployment_key, registry
from app.ingress.call_errors import classify
from app.ingress.client import ModelState
from app.ingress.placement_state import PlacementWatch
from app.ingress.prompt_chain import prompt_chain
from app.ingress.replica_links import Connector, ReplicaLinks, default_connector
from app.ingress.request_journal import RequestJournal
from app.transport.errors import FrameError
from app.transport.messages import StepRow, encode_abort
from engine.errors import EngineDeadError, OverloadedError, QuireError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest

logger = logging.getLogger("ray.serve")

# While requests are held back, a replica that comes free is noticed within this.
_DISPATCH_INTERVAL_S = 0.02

# How often unconfirmed bookings are looked through.
_EXPIRY_INTERVAL_S = 30.0
_RETIRE_POLL_S = 0.5
# Serve's own: whether routers run on a thread of theirs or on the loop that calls.
_ROUTER_THREAD_VARIABLE = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"


class ClientOptions(NamedTuple):
    """Bounds of a ReplicaSetClient.

    Attributes:
        max_attempts: failures of replicas under one request before it fails; being drained is none.
        max_unread_tokens: tokens of one request that wait for a late reader.
        placement_timeout_s: how long a request waits for a replica, a cold start included.
        final_record_s: how long after its Serve call has returned a request waits for its last tokens.
        expected_output_tokens: what a request is taken to produce, if its `max_tokens` allows.
        scales_to_zero: no replicas are no failure; the first request starts one.
    """

    max_attempts: int = 4
    max_unread_tokens: int = 32768
    placement_timeout_s: float = 600.0
    final_record_s: float = 5.0
    expected_output_tokens: int = 128
    scales_to_zero: bool = False


@dataclass(slots=True)
class _Attempt:
    """One submission. `num_received` is compared with the final record's count."""

    number: int
    journal: RequestJournal
    context: contextvars.Context
    num_failures: int
    excluded: frozenset[str]
    response: Any = None
    task: asyncio.Task[None] | None = None
    num_received: int = 0
    prompt_computed: bool = False


class ReplicaSetClient:
    """Serves one model by all replicas of its deployment; balances and resumes.

    Args:
        handle: of the engine deployment (a DeploymentHandle).
        balancer, connector: for tests; by default a Balancer and sockets with the cluster's secret.
    """

    def __init__(
        self,
        model_id: str,
        handle: Any,
        options: ClientOptions | None = None,
        *,
        balancer: Balancer | None = None,
        connector: Connector | None = None,
    ) -> None:
        self.model_id = model_id
        # Names this client to replicas and router; new with each process, so that no replica takes it for an old one.
        self.client_id = uuid.uuid4().hex
        self._handle = handle
        self._options = options or ClientOptions()
        self._balancer = balancer or Balancer()
        self._links = ReplicaLinks(model_id, self.client_id, self._balancer, connector or default_connector(), self)
        self._attempts: dict[int, _Attempt] = {}
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._generate: Any = None
        self._changed = asyncio.Event()
        self._dispatch_timer: asyncio.TimerHandle | None = None
        self._closed = False
        # Tests bring sockets of their own, and no cluster to ask.
        self._placement = PlacementWatch(handle, lambda: not self._links.live) if connector is None else None

    # The ModelClient protocol

    async def generate(self, request: EngineRequest) -> AsyncGenerator[list[SequenceOutput], None]:
        """As ModelClient.generate."""
        await self._start()
        journal = RequestJournal(request, self._options.max_unread_tokens)
        # Later attempts begin in callbacks of sockets; Serve must still see this request's context in their calls.
        self._submit(journal, contextvars.copy_context())
        try:
            while True:
                outputs = await journal.read()
                yield outputs
                if outputs[-1].request_finished:
                    return
        finally:
            attempt = self._attempts.get(journal.attempt)
            if attempt is not None:
                self._give_up(attempt)

    async def wait_ready(self, timeout_s: float) -> bool:
        """As ModelClient.wait_ready."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._start()
                while not self.state().ready:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def state(self) -> ModelState:
        """As ModelClient.state."""
        live = self._links.live
        lengths = [length for info in live if isinstance(length := info.metadata.get("max_model_len"), int)]
        simulated = next((name for info in live if (name := info.metadata.get("simulated"))), None)
        if live:
            detail = "ready" if simulated is None else f"ready, SIMULATED on {simulated}: its tokens mean nothing"
        elif self._options.scales_to_zero:
            detail = "no replica runs; the first request starts one"
        elif self._links.num_known:
            detail = f"connecting to replicas ({self._links.num_known} known)"
        else:
            awaited = self._placement.awaited if self._placement is not None else ""
            detail = awaited or "starting: no replica is ready yet"
        ready = not self._closed and (bool(live) or self._options.scales_to_zero)
        return ModelState(self.model_id, ready, len(live), detail, min(lengths, default=None), simulated)

    async def retire(self) -> None:
        """Wait until no request is left, then close: its model is no longer served here."""
        while self._attempts:  # noqa: ASYNC110 - nobody is in a hurry, and each request would have to tell
            await asyncio.sleep(_RETIRE_POLL_S)
        await self.close()

    async def close(self) -> None:
        """Abort what runs and hang up. Idempotent."""
        self._closed = True
        if self._placement is not None:
            self._placement.close()
        registry.unregister(self.client_id)
        for attempt in list(self._attempts.values()):
            self._end_with(attempt, EngineDeadError("the ingress is shutting down"))
        self._links.close()
        if self._dispatch_timer is not None:
            self._dispatch_timer.cancel()

    # What the request router calls, on its thread

    def place(self, attempt: int, *, refused: bool) -> Placement:
        """Where the router is to send an attempt. Raises BookingGoneError once it was given up."""
        return self._balancer.place(attempt, refused=refused)

    def replicas_changed(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        """Serve's replica list, to be taken over on the client's loop."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._adopt, replicas)

    def _adopt(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        if not self._closed:
            self._links.adopt(replicas)

    # Start

    async def _start(self) -> None:
        """Join the registry and wake the handle's router, which else learns of no replica before the first call."""
        if self._closed:
            raise EngineDeadError("the ingress is shutting down")
        if self._starting is None:
            self._loop = asyncio.get_running_loop()
            self._starting = self._loop.create_task(self._join())
        await asyncio.shield(self._starting)

    async def _join(self) -> None:
        assert self._loop is not None
        try:
            await self._links.fetch_secret()
            key = deployment_key(self._handle.app_name, self._handle.deployment_name)
            registry.register(self.client_id, key, self)
            if os.environ.get(_ROUTER_THREAD_VARIABLE, "1") == "1":
                # Makes the router, which waits for its thread's loop.
                self._generate = await asyncio.to_thread(lambda: self._handle.options(method_name="generate"))
            else:
                # It runs on this loop, and has to be made here.
                self._generate = self._handle.options(method_name="generate")
        except BaseException:
            self._starting = None
            raise
        self._loop.call_later(_EXPIRY_INTERVAL_S, self._expire)
        if self._placement is not None and not self._closed:
            self._placement.start()

    def _expire(self) -> None:
        assert self._loop is not None
        for number in self._balancer.expire():
            attempt = self._attempts.get(number)
            if attempt is not None:
                self._fail_over(attempt, "no replica has confirmed it")
        if not self._closed:
            self._loop.call_later(_EXPIRY_INTERVAL_S, self._expire)

    # What the links tell

    def stepped(self, rows: Iterable[StepRow]) -> None:
        """A step's tokens. Rows of attempts that were given up are dropped here."""
        for row in rows:
            attempt = self._attempts.get(row.attempt)
            if attempt is not None:
                self._take(attempt, row)

    def lost(self, attempts: Iterable[int], reason: str) -> None:
        """Their replica has gone."""
        for number in attempts:
            attempt = self._attempts.get(number)
            if attempt is not None:
                self._fail_over(attempt, reason)

    def leaving(self, attempts: Iterable[int], reason: str, *, only_waiting: bool) -> None:
        """Their replica leaves, but is well."""
        for number in attempts:
            attempt = self._attempts.get(number)
            if attempt is not None and not (only_waiting and attempt.num_received):
                self._resubmit(attempt, reason, attempt.num_failures, attempt.excluded)

    def changed(self) -> None:
        """Replicas have come or gone."""
        self._changed.set()

    # Attempts

    def _submit(
        self,
        journal: RequestJournal,
        context: contextvars.Context,
        num_failures: int = 0,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        assert self._loop is not None
        attempt = _Attempt(next(self._numbers), journal, context, num_failures, excluded)
        request = journal.resumed_request()
        # Registered before the call: its first token may be here before the call knows that it was accepted.
        journal.attempt = attempt.number
        self._attempts[attempt.number] = attempt
        placement = self._balancer.book(attempt.number, self._cost(request), excluded)
        if placement.held:
            self._schedule_dispatch()
        else:
            self._start_call(attempt, request)

    def _start_call(self, attempt: _Attempt, request: EngineRequest) -> None:
        assert self._loop is not None
        attempt.task = self._loop.create_task(
            self._call(attempt, request), name=f"call {request.request_id}", context=attempt.context
        )

    def _schedule_dispatch(self) -> None:
        if self._loop is not None and self._dispatch_timer is None:
            self._dispatch_timer = self._loop.call_later(_DISPATCH_INTERVAL_S, self._dispatch)

    def _dispatch(self) -> None:
        """Send on what was held back and has a replica now."""
        self._dispatch_timer = None
        for number in self._balancer.dispatch():
            attempt = self._attempts.get(number)
            if attempt is not None:
                self._start_call(attempt, attempt.journal.resumed_request())
        if self._balancer.num_held:
            self._schedule_dispatch()

    def _cost(self, request: EngineRequest) -> RequestCost:
        params = request.sampling_params
        produced = sum(len(sequence.token_ids) for sequence in request.resumed)
        expected = self._options.expected_output_tokens
        if params.max_tokens is not None:
            expected = min(expected, params.max_tokens)
        num_tokens = len(request.prompt_token_ids) + produced
        hashing = self._links.hashing
        if hashing is None:
            return RequestCost(num_tokens, expected, params.n)
        fingerprint, block_size = hashing
        chain = prompt_chain(request, fingerprint, block_size)
        return RequestCost(num_tokens, expected, params.n, chain, block_size)

    async def _call(self, attempt: _Attempt, request: EngineRequest) -> None:
        """The Serve call of an attempt, from its start to its reply or failure."""
        assert self._loop is not None
        waited_s = time.monotonic() - attempt.journal.began_s
        timeout = self._loop.call_later(self._options.placement_timeout_s, self._check_placed, attempt)
        try:
            attempt.response = self._generate.remote(
                request, ingress_id=self.client_id, attempt=attempt.number, waited_s=waited_s
            )
            await attempt.response
        except asyncio.CancelledError:
            # By us, and then the attempt is gone; or by Serve, which cancels the calls of an HTTP request that ends.
            if self._is_current(attempt):
                self._end_with(attempt, EngineDeadError("the request's call was cancelled"))
        except Exception as error:
            if self._is_current(attempt):
                self._call_failed(attempt, error)
        else:
            if self._is_current(attempt):
                # The last tokens travel another road and may come later, but not much.
                self._loop.call_later(self._options.final_record_s, self._check_final, attempt)
        finally:
            timeout.cancel()

    def _is_current(self, attempt: _Attempt) -> bool:
        return self._attempts.get(attempt.number) is attempt

    def _check_placed(self, attempt: _Attempt) -> None:
        if self._is_current(attempt) and self._balancer.replica_of(attempt.number) is None:
            waited_s = self._options.placement_timeout_s
            self._end_with(attempt, EngineDeadError(f"no replica of {self.model_id} was ready within {waited_s:g} s"))

    def _check_final(self, attempt: _Attempt) -> None:
        if self._is_current(attempt):
            self._fail_over(attempt, "its final record did not come")

    def _call_failed(self, attempt: _Attempt, error: Exception) -> None:
        failure = classify(error)
        at = self._balancer.replica_of(attempt.number)
        elsewhere = at is not None and self._balancer.has_alternative(at)
        if failure.verdict == "outage" or (failure.verdict == "overload" and elsewhere):
            self._fail_over(attempt, str(failure.error), at)
        else:
            if type(failure.error) is QuireError:
                logger.error("Model %s: a replica failed a request", self.model_id, exc_info=error)
            self._end_with(attempt, failure.error)

    def _take(self, attempt: _Attempt, row: StepRow) -> None:
        output, journal = row.output, attempt.journal
        if not 0 <= output.index < journal.request.sampling_params.n:
            raise FrameError(f"STEP names sequence {output.index} of {journal.request.sampling_params.n}")
        attempt.num_received += len(output.token_ids)
        if not attempt.prompt_computed:
            attempt.prompt_computed = True
            self._balancer.computed(attempt.number)
        if output.finish_reason == "abort":
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

    def _complete(self, attempt: _Attempt, final_count: int) -> None:
        if attempt.num_received != final_count:
            request_id = attempt.journal.request.request_id
            message = f"request {request_id}: {attempt.num_received} tokens came, the replica sent {final_count}"
            self._end_with(attempt, QuireError(message))
            return
        # The call returns on its own; nothing waits for it.
        self._forget(attempt)
        attempt.journal.finish()

    def _fail_over(self, attempt: _Attempt, reason: str, failed_replica: str | None = None) -> None:
        """Go on elsewhere after a failure, unless there were too many."""
        num_failures = attempt.num_failures + 1
        if num_failures >= self._options.max_attempts:
            request_id = attempt.journal.request.request_id
            message = f"request {request_id} failed on {num_failures} replicas, the last time: {reason}"
            self._end_with(attempt, EngineDeadError(message))
            return
        excluded = attempt.excluded if failed_replica is None else attempt.excluded | {failed_replica}
        self._resubmit(attempt, reason, num_failures, excluded)

    def _resubmit(self, attempt: _Attempt, reason: str, num_failures: int, excluded: frozenset[str]) -> None:
        journal = attempt.journal
        self._give_up(attempt)
        if journal.sequences_finished:
            journal.finish()
            return
        logger.info(
            "Request %s goes on elsewhere after %d tokens: %s", journal.request.request_id, journal.num_tokens, reason
        )
        self._submit(journal, attempt.context, num_failures, excluded)

    def _end_with(self, attempt: _Attempt, error: QuireError) -> None:
        self._give_up(attempt)
        attempt.journal.fail(error)

    def _give_up(self, attempt: _Attempt) -> None:
        """Abort an attempt on its replica, by both roads: the socket is the faster, the call the surer."""
        at = self._balancer.replica_of(attempt.number)
        self._forget(attempt)
        if at is not None:
            self._links.send(at, encode_abort((attempt.number,)))
        if attempt.response is not None:
            try:
                attempt.response.cancel()
            except Exception as error:
                # Serve raises here what the call had failed with; it is over either way.
                logger.debug("cancelling a call that had failed: %s", error)
        if attempt.task is not None and not attempt.task.done():
            attempt.task.cancel()

    def _forget(self, attempt: _Attempt) -> None:
        self._attempts.pop(attempt.number, None)
        self._balancer.release(attempt.number)
