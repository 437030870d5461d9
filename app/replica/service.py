"""What a replica does, without Serve: admits requests, publishes each step, reports load, aborts, drains."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from app.autoscaling.report import ReplicaReport
from app.replica.block_log import BlockLog
from app.replica.counters import CounterReporter
from app.replica.demand import Demand
from app.replica.engine import Engine
from app.replica.load_reporter import LoadReporter
from app.replica.stream import Stream
from app.replica.stream_server import StreamServer
from app.telemetry.engine_trace import EngineTrace
from app.telemetry.tracing import Tracing
from app.transport.demand_messages import DemandShare
from app.transport.messages import Draining, StepMessage, encode_draining, encode_refused
from app.transport.submit_messages import Submission
from engine.errors import EngineDeadError
from engine.memory import BlockChanges
from engine.outputs import SequenceOutput
from engine.request import EngineRequest

logger = logging.getLogger("ray.serve")

# How soon a failed engine is noticed.
_WATCH_INTERVAL_S = 0.25
# An ABORT can overtake its Serve call, and that a SUBMIT; so many of each are remembered per ingress.
_REMEMBERED = 4096
# What SUBMIT has brought is given up when no call has come for it after this, as Serve would not count it; what has
# ended by then is forgotten.
_CALL_WITHIN_S = 30.0


class ReplicaService:
    """Joins an engine to its ingresses' sockets.

    The engine thread does nothing but hand a step's outputs over; they are grouped, encoded and written on the
    server's thread while the engine computes the next step.

    Args:
        model_id: what users call the model, for spans.
        tracing: where the spans of requests go that an ingress has sampled; None keeps none.
    """

    def __init__(
        self, engine: Engine, server: StreamServer, model_id: str = "", tracing: Tracing | None = None
    ) -> None:
        self._model_id = model_id
        self._tracing = tracing
        self._engine = engine
        self._server = server
        self._blocks = BlockLog()
        self._load = LoadReporter(engine.stats, server, self._blocks)
        self._counters = CounterReporter(engine.accounts, server)
        self._demand = Demand()
        self._streams: dict[str, Stream] = {}
        # By ingress: what it has aborted, and what its calls have brought, which SUBMIT must not begin again.
        self._aborts: dict[str, dict[int, None]] = {}
        self._called: dict[str, dict[int, None]] = {}
        # What SUBMIT has brought and no call has come for yet, ended or not.
        self._unclaimed: dict[str, Stream] = {}
        self._claiming = threading.Lock()
        self._dead: EngineDeadError | None = None
        self._closed = False

    def start(self) -> None:
        """Start the sockets, then the engine. The server's port is known afterwards."""
        self._server.start(self)
        self._engine.start(self._on_step, self._on_blocks)
        self._server.call_soon(self._watch)
        self._server.call_soon(self._counters.start)

    def close(self, reason: str = "the replica stops") -> None:
        """Tell the ingresses to move what runs here, end the engine and hang up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._counters.close()
        self._server.call_soon(self._announce, Draining(0.0, reason))
        self._engine.shutdown()
        self._server.close()

    def check_health(self) -> None:
        """Raise EngineDeadError if the engine has failed, or has work and completes no step."""
        self._engine.check_health()

    def scaling_report(self, max_num_seqs: int, step_tokens: int) -> ReplicaReport:
        """What the replica tells autoscaling; the arguments are bounds of its engine. Any thread."""
        stats, demand = self._engine.stats(), self._demand.totals
        return ReplicaReport(
            offered_requests=demand.requests,
            offered_prompt_tokens=demand.prompt_tokens,
            offered_prompt_squares=demand.prompt_squares,
            offered_output_tokens=demand.output_tokens,
            queued_s=demand.queued_s,
            demand_shares=demand.shares,
            num_ingresses=demand.num_ingresses,
            num_waiting=stats.num_waiting,
            num_waiting_tokens=stats.num_waiting_tokens,
            num_running=stats.num_running,
            num_output_tokens=stats.num_output_tokens,
            kv_use=1.0 - stats.num_free_blocks / stats.num_blocks,
            prompt_tokens_per_s=self._load.meter.prompt_capacity(step_tokens),
            max_num_seqs=max_num_seqs,
        )

    async def generate(
        self,
        request: EngineRequest,
        *,
        ingress_id: str,
        attempt: int,
        waited_s: float = 0.0,
        trace: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run a request to its end; its tokens leave by the socket of `ingress_id`. SUBMIT may have begun it.

        Args:
            attempt: a number that this ingress has used for nothing else.
            waited_s: how long the request has waited since it first arrived; it keeps its place in the queue.
            trace: W3C headers that name the ingress's span of this attempt, if it is sampled.

        Returns:
            The final record: counts and finish reasons.

        Raises:
            RequestError, PromptTooLongError: the engine refused the request.
            AdapterUnavailableError: its adapter cannot be loaded here.
            EngineDeadError: the engine fails, or the ingress is not connected here.
        """
        ours = Stream(f"{ingress_id}/{attempt}", request.request_id, ingress_id, attempt, time.monotonic())
        with self._claiming:
            stream = self._unclaimed.pop(ours.key, ours)
            if stream is ours:
                # Known before it is looked for: an ABORT or a lost line from here on finds it.
                self._streams[ours.key] = ours
                if ingress_id in self._called:
                    _remember(self._called[ingress_id], attempt)
        done = stream.claim()
        try:
            if stream is ours:
                self._admit(stream, request, waited_s, trace)
            await done
        finally:
            if not stream.ended:
                # The call was cancelled. The stream stays until the engine's last word, which is its final record.
                stream.aborted = True
                self._engine.abort(stream.key)
        if stream.refusal is not None:
            raise stream.refusal
        if "error" in stream.finish_reasons.values():
            raise EngineDeadError(f"the engine failed while request {request.request_id} ran")
        return stream.record()

    def _admit(
        self,
        stream: Stream,
        request: EngineRequest,
        waited_s: float,
        trace: Mapping[str, str] | None,
        uncached_tokens: int = 0,
    ) -> None:
        if trace is not None and self._tracing is not None:
            span = self._tracing.continue_from(trace)
            if span is not None:
                stream.trace = EngineTrace(self._tracing, span, self._model_id, request)
        try:
            if self._dead is not None:
                raise self._dead
            if not self._server.is_subscribed(stream.ingress_id):
                raise EngineDeadError(f"ingress {stream.ingress_id} is not connected to this replica")
            if stream.attempt in self._aborts.get(stream.ingress_id, ()):
                stream.aborted = True
            num_steps = self._engine.stats().num_steps
            self._engine.add_request(
                dataclasses.replace(
                    request,
                    request_id=stream.key,
                    arrival_time=time.monotonic() - waited_s,
                    timeline=stream.trace.timeline if stream.trace is not None else None,
                )
            )
        except BaseException as error:
            stream.ended = True
            del self._streams[stream.key]
            if stream.trace is not None:
                stream.trace.failed(str(error))
            raise
        if stream.aborted:
            self._engine.abort(stream.key)
        self._server.call_soon(self._load.admitted, stream.ingress_id, stream.attempt, num_steps, uncached_tokens)

    # On the engine thread

    def _on_step(self, outputs: list[SequenceOutput]) -> None:
        self._server.call_soon(self._publish, outputs)

    def _on_blocks(self, changes: BlockChanges) -> None:
        self._server.call_soon(self._publish_blocks, changes)

    # On the server's thread

    def subscribed(self, ingress_id: str) -> None:
        self._aborts[ingress_id] = {}
        self._called[ingress_id] = {}
        self._load.subscribed(ingress_id)
        self._counters.subscribed(ingress_id)
        if self._dead is not None:
            self._server.send(ingress_id, encode_draining(Draining(0.0, str(self._dead))))

    def unsubscribed(self, ingress_id: str) -> None:
        del self._aborts[ingress_id]
        del self._called[ingress_id]
        self._load.unsubscribed(ingress_id)
        self._demand.gone(ingress_id)
        for stream in list(self._streams.values()):
            if stream.ingress_id == ingress_id:
                stream.aborted = True
                self._engine.abort(stream.key)

    def aborted(self, ingress_id: str, attempts: Iterable[int]) -> None:
        remembered = self._aborts[ingress_id]
        for attempt in attempts:
            _remember(remembered, attempt)
            stream = self._streams.get(f"{ingress_id}/{attempt}")
            if stream is not None:
                stream.aborted = True
                self._engine.abort(stream.key)

    def stopped(self, ingress_id: str, attempt: int, index: int) -> None:
        stream = self._streams.get(f"{ingress_id}/{attempt}")
        if stream is not None:
            self._engine.abort(stream.key, index)

    def synced(self, ingress_id: str, number: int) -> None:
        self._server.send(ingress_id, self._blocks.since(number))

    def submitted(self, ingress_id: str, submission: Submission) -> None:
        attempt, request = submission.attempt, submission.request
        stream = Stream(f"{ingress_id}/{attempt}", request.request_id, ingress_id, attempt, time.monotonic())
        with self._claiming:
            if attempt in self._aborts[ingress_id] or attempt in self._called[ingress_id]:
                return
            self._streams[stream.key] = self._unclaimed[stream.key] = stream
        try:
            self._admit(stream, request, submission.waited_s, submission.trace, submission.uncached_tokens)
        except Exception as error:
            # The call fails in the same way if it has not come yet, and now if it has.
            self._unclaimed.pop(stream.key, None)
            stream.refusal = error
            stream.end()
            self._server.send(ingress_id, encode_refused((attempt,)))

    def demanded(self, ingress_id: str, share: DemandShare) -> None:
        self._demand.told(ingress_id, share)

    def _publish_blocks(self, changes: BlockChanges) -> None:
        frame = self._blocks.add(changes)
        for ingress_id in self._server.subscribers:
            self._server.send(ingress_id, frame)

    def _publish(self, outputs: list[SequenceOutput]) -> None:
        """One step: one frame, and one write, for each ingress that has tokens in it. A load that is due goes along."""
        messages: dict[str, StepMessage] = {}
        ended = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.num_output_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                stream.finish_reasons[output.index] = output.finish_reason
            if output.num_cached_tokens == stream.num_cached_tokens:
                # The engine repeats the number with every token; the wire carries it once.
                output.num_cached_tokens = 0
            else:
                stream.num_cached_tokens = output.num_cached_tokens
            if output.waited_s == stream.waited_s:
                output.waited_s = 0.0
            else:
                stream.waited_s = output.waited_s
            final_count = stream.num_output_tokens if output.request_finished else None
            if output.error is not None:
                # Its call fails with it, and the ingress may know of a replica where it would not.
                stream.refusal = output.error
            else:
                message = messages.get(stream.ingress_id)
                if message is None:
                    message = messages[stream.ingress_id] = StepMessage()
                message.add(stream.attempt, output, final_count)
            if output.request_finished:
                del self._streams[stream.key]
                self._load.ended(stream.ingress_id, stream.attempt)
                ended.append(stream)
        self._load.send_with({ingress_id: message.encode() for ingress_id, message in messages.items()})
        for stream in ended:
            stream.end()
            if stream.trace is not None and stream.refusal is not None:
                stream.trace.failed(str(stream.refusal))
            elif stream.trace is not None:
                stream.trace.end(stream.num_cached_tokens, stream.num_output_tokens, stream.finish_reasons)

    def _announce(self, draining: Draining) -> None:
        frame = encode_draining(draining)
        for ingress_id in self._server.subscribers:
            self._server.send(ingress_id, frame)

    def _give_up_unclaimed(self, submitted_before_s: float) -> None:
        for key, stream in list(self._unclaimed.items()):
            if stream.submitted_s >= submitted_before_s or self._unclaimed.pop(key, None) is None:
                continue
            # Ingresses spare themselves the call of what has ended soon.
            if not (stream.ended or stream.aborted):
                logger.warning("Request %s: its Serve call did not come", stream.request_id)
                if stream.ingress_id in self._aborts:
                    self.aborted(stream.ingress_id, (stream.attempt,))

    def _watch(self) -> None:
        if self._closed or self._dead is not None:
            return
        try:
            self._engine.check_health()
        except EngineDeadError as error:
            logger.error("The engine has failed; its requests move to other replicas: %s", error)
            self._dead = error
            self._announce(Draining(0.0, str(error)))
            for stream in list(self._streams.values()):
                stream.finish_reasons[0] = "error"
                stream.end()
                if stream.trace is not None:
                    stream.trace.failed(str(error))
            self._streams.clear()
            return
        self._give_up_unclaimed(time.monotonic() - _CALL_WITHIN_S)
        self._server.call_later(_WATCH_INTERVAL_S, self._watch)


def _remember(attempts: dict[int, None], attempt: int) -> None:
    """The latest of them."""
    attempts[attempt] = None
    if len(attempts) > _REMEMBERED:
        del attempts[next(iter(attempts))]
