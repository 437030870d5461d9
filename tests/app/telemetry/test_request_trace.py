"""The spans of attempts, against replicas that are driven by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from app.balancer import Balancer
from app.telemetry import spans
from app.telemetry.request_trace import RequestTrace, current_trace
from app.transport.messages import LoadReport, encode_load
from engine.errors import RequestError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from tests.app.ingress.test_replica_client import World, make_request, until, wrapped
from tests.app.telemetry.collected import Collected, attributes_of

pytestmark = pytest.mark.anyio


class TracedWorld(World):
    """A World whose requests belong to one sampled HTTP request."""

    def __init__(self, balancer: Balancer | None = None) -> None:
        super().__init__(balancer=balancer)
        self.collected = Collected()
        span = self.collected.tracing.begin({}, "root", SpanKind.SERVER, {})
        assert span is not None
        self.trace = RequestTrace(self.collected.tracing, span, "root", {})

    def read(self, request: EngineRequest) -> asyncio.Task[list[SequenceOutput]]:
        with self.trace.active():
            return super().read(request)

    def attempts(self) -> list[ReadableSpan]:
        self.trace.end()
        return [span for span in self.collected.spans if span.name == "attempt"]


@pytest.fixture
async def world() -> AsyncIterator[TracedWorld]:
    world = TracedWorld()
    await world.start("a", "b")
    yield world
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def test_an_attempts_spans_and_what_its_replica_is_told(world: TracedWorld) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    replica.step(call)
    replica.step(call, finish="length")
    await reader
    (attempt,) = world.attempts()
    assert world.collected.tree() == {
        "": ["root"],
        "root": ["attempt"],
        "attempt": ["balancer queue", "route"],
    }
    assert attempt.context is not None
    assert call.trace is not None
    assert call.trace["traceparent"] == f"00-{attempt.context.trace_id:032x}-{attempt.context.span_id:016x}-01"
    assert attempt.kind is SpanKind.CLIENT
    assert attempt.status.is_unset
    assert attributes_of(attempt) == {
        spans.ENGINE_REQUEST_ID: "request",
        spans.ATTEMPT_NUMBER: 1,
        spans.REPLICA: replica.name,
        spans.CACHED_INPUT_TOKENS: 0,
    }
    assert attributes_of(world.collected.named("route")) == {spans.REPLICA: replica.name, spans.NUM_REFUSALS: 0}
    queue = world.collected.named("balancer queue")
    (decision,) = queue.events
    decided = dict(decision.attributes or {})
    assert (decided[spans.OUTCOME], decided[spans.REPLICA]) == ("placed", replica.name)
    assert decided[spans.NUM_CANDIDATES] == 2
    # Five tokens on an idle replica, at the rate that is assumed of one that has measured nothing.
    assert decided[spans.PREDICTED_PREFILL] == pytest.approx(5 / 1000)
    assert decided[spans.PREDICTED_WAIT] == decided[spans.EXPECTED_CACHED_TOKENS] == 0
    assert float(str(decided[spans.PREDICTED_COST])) >= 5 / 1000


async def test_a_lost_replica_ends_its_attempt_and_another_begins(world: TracedWorld) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    replica.step(call, count=2)
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    other.step(second, finish="length")
    await reader
    failed, succeeded = world.attempts()
    assert [attributes_of(span)[spans.ATTEMPT_NUMBER] for span in (failed, succeeded)] == [1, 2]
    assert [attributes_of(span)[spans.REPLICA] for span in (failed, succeeded)] == [replica.name, other.name]
    assert "reset" in str(failed.status.description)
    assert succeeded.status.is_unset
    assert call.trace != second.trace
    assert world.collected.tree()["attempt"] == ["balancer queue", "route"] * 2


async def test_a_refusal_is_a_failed_attempt(world: TracedWorld) -> None:
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    call.reply.set_exception(wrapped(RequestError("no such adapter")))
    with pytest.raises(RequestError):
        await reader
    (attempt,) = world.attempts()
    assert attempt.status.description == "no such adapter"


@pytest.mark.parametrize("answered", [True, False])
async def test_a_reader_that_leaves(world: TracedWorld, answered: bool) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    replica.step(call)
    if answered:
        # A stop string: the reader has all that it wanted before the engine has.
        world.trace.answered("request", 0, ["stop"])
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    (attempt,) = world.attempts()
    assert attempt.status.description == (None if answered else "its reader has gone")


async def test_a_request_held_back_waits_in_the_balancers_queue() -> None:
    world = TracedWorld(Balancer(hold_s=0.05))
    await world.start("a")
    replica = world.fleet.replicas["a"]
    replica.receive(encode_load(LoadReport(num_waiting_tokens=200, prefill_tokens_per_s=1000.0)))
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    replica.step(call, finish="length")
    await reader
    queue = world.collected.named("balancer queue")
    assert [dict(event.attributes or {})[spans.OUTCOME] for event in queue.events] == ["held", "placed"]
    assert (queue.end_time or 0) - (queue.start_time or 0) > 50e6
    await world.client.close()
    world.fleet.publish()


async def test_a_request_that_is_left_while_held_back_has_only_waited() -> None:
    world = TracedWorld(Balancer(hold_s=0.05))
    await world.start("a")
    replica = world.fleet.replicas["a"]
    replica.receive(encode_load(LoadReport(num_waiting_tokens=2000, prefill_tokens_per_s=1000.0)))
    reader = world.read(make_request())
    await until(lambda: world.balancer.num_held)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert world.collected.tree() == {"attempt": ["balancer queue"], "elsewhere": ["attempt"]}
    assert world.collected.named("balancer queue").status.description == "its reader has gone"
    await world.client.close()
    world.fleet.publish()


async def test_without_a_replica_the_wait_is_the_routes() -> None:
    world = TracedWorld()
    await world.start()
    reader = world.read(make_request())
    await asyncio.sleep(0.05)
    world.fleet.add("late")
    world.fleet.publish("late")
    replica = world.fleet.replicas["late"]
    await until(lambda: replica.listener)
    replica.come_up()
    _, call = await world.fleet.first_call()
    replica.step(call, finish="length")
    await reader
    (decision,) = world.collected.named("balancer queue").events
    assert dict(decision.attributes or {}) == {spans.OUTCOME: "unplaced", spans.NUM_CANDIDATES: 0}
    route = world.collected.named("route")
    assert attributes_of(route)[spans.REPLICA] == "late"
    assert (route.end_time or 0) - (route.start_time or 0) > 40e6
    await world.client.close()
    world.fleet.publish()


def test_there_is_no_trace_outside_of_a_request() -> None:
    assert current_trace() is None
