"""ReplicaSetClient: a ModelClient over the replicas of one engine deployment.

It joins the parts: ReplicaLinks has a line to each replica, Balancer says where a request goes, Attempts takes it there
and elsewhere if need be. Everything runs on one event loop but `place` and `replicas_changed`, which the request router
calls from its thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from app.autoscaling.start_failures import StartFailures
from app.balancer import Balancer, Placement, RequestTerms
from app.balancer.admission_settings import AdmissionSettings, ClassSettings
from app.balancer.registry import ReplicaInfo, deployment_key, registry
from app.balancer.reservations import News
from app.balancer.terms import DEFAULT_CLASS
from app.ingress.attempt import ClientOptions
from app.ingress.attempts import Attempts
from app.ingress.client import ModelState
from app.ingress.demand import Demand
from app.ingress.placement_state import PlacementWatch
from app.ingress.receipt import Receipt
from app.ingress.replica_links import Connector, ReplicaLinks, default_connector
from app.ingress.request_journal import RequestJournal
from app.ingress.scaling_state import DeploymentName
from app.telemetry.model_samples import ModelTelemetry
from app.telemetry.request_trace import current_trace
from app.transport.messages import StepRow
from engine.errors import EngineDeadError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest

logger = logging.getLogger("ray.serve")

# How often unconfirmed bookings are looked through.
_EXPIRY_INTERVAL_S = 30.0
_RETIRE_POLL_S = 0.5
# Whoever waits for a first replica is told so when so many have failed to start meanwhile: one may be chance.
_MOST_FAILED_STARTS = 2
# Serve's own: whether routers run on a thread of theirs or on the loop that calls.
_ROUTER_THREAD_VARIABLE = "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP"

_UNBOUNDED = AdmissionSettings({DEFAULT_CLASS: ClassSettings(0, math.inf)})


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
        self._demand = Demand(self._links, lambda: self._balancer.queued_s, self._options.expected_output_tokens)
        self._attempts = Attempts(model_id, self.client_id, self._balancer, self._links, self._options, self._demand)
        self._journals: dict[str, RequestJournal] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._closed = False
        # No replicas are no failure: the first request starts one.
        self._scales_to_zero = False
        # Tests bring sockets of their own, and no cluster to ask.
        self._placement = None
        if connector is None:
            self._placement = PlacementWatch(handle, lambda: not self._links.live, self.starts_failed)
        self._failed_starts = StartFailures()
        self._failed_before: int | None = None

    # The ModelClient protocol

    async def generate(
        self, request: EngineRequest, receipt: Receipt | None = None, terms: RequestTerms | None = None
    ) -> AsyncGenerator[list[SequenceOutput], None]:
        """As ModelClient.generate."""
        await self._start()
        self._demand.arrived(request)
        journal = RequestJournal(request, self._options.max_unread_tokens, receipt, current_trace(), terms)
        self._journals[request.request_id] = journal
        try:
            self._attempts.submit(journal)
            while True:
                outputs = await journal.read()
                yield outputs
                if outputs[-1].request_finished:
                    return
        finally:
            self._journals.pop(request.request_id, None)
            self._attempts.leave(journal)

    @property
    def admission(self) -> AdmissionSettings:
        """As ModelClient.admission; without admission, one class that waits for ever."""
        return self._balancer.admission or _UNBOUNDED

    def set_admission(self, settings: AdmissionSettings) -> None:
        """Admit by other settings from now on; ValueError if it was made without."""
        self._balancer.set_admission(settings)

    def take_promises(self) -> News:
        """What other ingresses should know of this model's refused requests."""
        return self._balancer.take_promises()

    def hear_promises(self, news: News) -> None:
        """What another ingress has told refused requests of this model."""
        self._balancer.hear_promises(news)

    def stop(self, request_id: str, index: int) -> None:
        """As ModelClient.stop."""
        journal = self._journals.get(request_id)
        if journal is not None:
            self._attempts.stop(journal, index)

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
        elif self._scales_to_zero:
            detail = "no replica runs; the first request starts one" + self._last_failure
        elif self._links.num_known:
            detail = f"connecting to replicas ({self._links.num_known} known)"
        else:
            awaited = self._placement.awaited if self._placement is not None else ""
            detail = (awaited or "starting: no replica is ready yet") + self._last_failure
        ready = not self._closed and (bool(live) or self._scales_to_zero)
        return ModelState(self.model_id, ready, len(live), detail, min(lengths, default=None), simulated)

    @property
    def _last_failure(self) -> str:
        reason = self._failed_starts.reason
        return f"; the last start failed: {reason}" if reason else ""

    def starts_failed(self, failures: StartFailures) -> None:
        """What is known of failed starts while no replica runs: requests need not wait for those that cannot start."""
        self._failed_starts = failures
        # One may have come up since it was asked for.
        if self._failed_before is None or self._links.live or not self._attempts.num_without_replica:
            self._failed_before = failures.number
        elif failures.number - self._failed_before >= _MOST_FAILED_STARTS:
            self._failed_before = failures.number
            logger.error("Model %s: no replica can start: %s", self.model_id, failures.reason)
            message = f"no replica of {self.model_id} could start; the server's log and /health say why"
            self._attempts.fail_without_replica(EngineDeadError(message))

    @property
    def deployment(self) -> DeploymentName:
        """The engine deployment that it is a client of."""
        return DeploymentName(self._handle.app_name, self._handle.deployment_name)

    def telemetry(self) -> ModelTelemetry:
        """As ModelClient.telemetry."""
        return ModelTelemetry(
            routes=self._attempts.counts,
            num_bookings=self._balancer.num_bookings,
            num_held=self._balancer.num_held,
            admission=self._balancer.admission_state(),
            num_replicas=len(self._links.live),
            replicas=self._links.counters,
        )

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
        self._demand.close()
        self._attempts.close()
        self._links.close()

    # What the request router calls, on its thread

    def place(self, attempt: int, *, refused: bool) -> Placement:
        """Where the router is to send an attempt. Raises BookingGoneError once it was given up."""
        placement = self._balancer.place(attempt, refused=refused)
        self._attempts.placed(attempt, placement.replica_id, refused=refused)
        return placement

    def replicas_changed(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        """Serve's replica list, to be taken over on the client's loop."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._adopt, replicas)

    def described(self, *, scales_to_zero: bool) -> None:
        """What the deployment's config says of it."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._describe, scales_to_zero)

    def _adopt(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        if self._closed:
            return
        told = [info.metadata["scales_to_zero"] for info in replicas if "scales_to_zero" in info.metadata]
        if told:
            # While a change is rolled out some say so and others not; at zero the last word stands.
            self._describe(any(told))
        self._links.adopt(replicas)

    def _describe(self, scales_to_zero: bool) -> None:
        self._scales_to_zero = scales_to_zero
        self._changed.set()

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
                generate = await asyncio.to_thread(lambda: self._handle.options(method_name="generate"))
            else:
                # It runs on this loop, and has to be made here.
                generate = self._handle.options(method_name="generate")
        except BaseException:
            self._starting = None
            raise
        self._attempts.call_by(generate)
        self._loop.call_later(_EXPIRY_INTERVAL_S, self._expire)
        if not self._closed:
            self._demand.start()
            if self._placement is not None:
                self._placement.start()

    def _expire(self) -> None:
        assert self._loop is not None
        if not self._closed:
            self._loop.call_later(_EXPIRY_INTERVAL_S, self._expire)
        self._attempts.expire()

    # What the links tell

    def stepped(self, rows: Iterable[StepRow]) -> None:
        """A step's tokens."""
        self._attempts.stepped(rows)

    def refused(self, attempts: Iterable[int]) -> None:
        """Their replica did not take them."""
        self._attempts.refused(attempts)

    def lost(self, attempts: Iterable[int], reason: str) -> None:
        """Their replica has gone."""
        self._attempts.lost(attempts, reason)

    def leaving(self, attempts: Iterable[int], reason: str, *, only_waiting: bool) -> None:
        """Their replica leaves, but is well."""
        self._attempts.leaving(attempts, reason, only_waiting=only_waiting)

    def changed(self) -> None:
        """Replicas have come or gone."""
        self._changed.set()
        self._demand.start()
