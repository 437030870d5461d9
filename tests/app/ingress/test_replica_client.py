"""The client's state machine against replicas that are driven by hand: no Ray cluster, no sockets."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import pytest

from app.autoscaling.start_failures import StartFailures
from app.balancer import Balancer, BookingGoneError
from app.balancer.admission_settings import AdmissionSettings, ClassSettings, terms_of_class
from app.balancer.registry import ReplicaInfo, registry
from app.ingress.prompt_chain import prompt_chain
from app.ingress.receipt import Receipt
from app.replica.block_log import BlockLog
from app.telemetry.model_samples import RouteCounts
from app.transport.block_messages import decode_sync
from app.transport.counter_messages import ReplicaCounters, encode_counters
from app.transport.demand_messages import DemandShare, decode_demand
from app.transport.frames import Frame, FrameDecoder
from app.transport.handshake import MAX_VERSION, MIN_VERSION
from app.transport.link import Endpoint, LinkListener
from app.transport.messages import (
    Draining,
    Kind,
    LoadReport,
    StepMessage,
    decode_abort,
    decode_stop,
    encode_draining,
    encode_load,
    encode_refused,
)
from app.transport.submit_messages import SUBMIT_VERSION, decode_submit
from engine.errors import (
    AdapterUnavailableError,
    EngineDeadError,
    OverloadedError,
    PromptTooLongError,
    QuireError,
    RequestError,
)
from engine.memory import BlockChanges
from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

    from app.ingress.attempt import ClientOptions
    from app.ingress.replica_client import ReplicaSetClient
    from app.ingress.replica_links import Connector

pytestmark = pytest.mark.anyio

# What Serve's router calls the deployment.
KEY = "app#engine"
OPTIONS = ClientOptions(final_record_s=0.1, placement_timeout_s=5.0, call_after_s=0.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def token(request: EngineRequest, index: int, position: int) -> int:
    """What sequence `index` draws at `position`, wherever it runs."""
    return (sum(request.prompt_token_ids) * 31 + index * 101 + position * 7) % 5000


def expected(request: EngineRequest, count: int, index: int = 0) -> list[int]:
    return [token(request, index, position) for position in range(count)]


class Call:
    """One Serve call, as its replica sees it and as the client awaits it."""

    def __init__(self, request: EngineRequest, attempt: int, waited_s: float, trace: dict[str, str] | None) -> None:
        self.request = request
        self.trace = trace
        self.attempt = attempt
        self.waited_s = waited_s
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.cancelled = False
        resumed = request.resumed or (ResumedSequence(),) * request.sampling_params.n
        self.positions = [len(sequence.token_ids) for sequence in resumed]
        self.num_sent = 0

    def __await__(self) -> Any:
        return asyncio.shield(self.reply).__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Replica:
    """A replica driven by hand; also the link to it."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.fleet = fleet
        self.name = name
        self.calls: list[Call] = []
        self.sent: list[Frame] = []
        self.redialing = True
        self.closed = False
        self.listener: LinkListener | None = None
        self.endpoint = Endpoint(name, 1, name)
        metadata = {
            "host": name,
            "port": 1,
            "epoch": name,
            "block_size": 16,
            "max_model_len": 512,
            "fingerprint": "model",
            "protocol": [MIN_VERSION, fleet.max_version],
        }
        self.info = ReplicaInfo(name, {**metadata, "graceful_shutdown_timeout_s": 0.4})

    def send(self, data: bytes) -> None:
        self.sent += FrameDecoder().feed(data)

    def stop_redialing(self) -> None:
        self.redialing = False

    def close(self) -> None:
        self.closed = True

    def receive(self, data: bytes) -> None:
        """The client gets these frames."""
        assert self.listener is not None
        for frame in FrameDecoder().feed(data):
            self.listener.link_frame(self, frame)

    def come_up(self) -> None:
        self.receive(encode_load(LoadReport(num_blocks=100, num_free_blocks=100)))

    def go_down(self) -> None:
        assert self.listener is not None
        self.listener.link_down(self, ConnectionResetError("reset"))

    def step(self, call: Call, *, count: int = 1, finish: FinishReason | None = None, index: int = 0) -> None:
        """One engine step of one sequence; `finish` ends the request."""
        message = StepMessage()
        self.add_to(message, call, count=count, finish=finish, index=index)
        self.receive(message.encode())

    def add_to(
        self,
        message: StepMessage,
        call: Call,
        *,
        count: int = 1,
        finish: FinishReason | None = None,
        index: int = 0,
        ends: bool = True,
    ) -> None:
        start = call.positions[index]
        call.positions[index] += count
        call.num_sent += count
        tokens = [token(call.request, index, position) for position in range(start, start + count)]
        output = SequenceOutput("", index, tokens, finish_reason=finish)
        message.add(call.attempt, output, call.num_sent if finish and ends else None)

    @property
    def submitted(self) -> list[int]:
        found = [decode_submit(frame) for frame in self.sent if frame.kind == Kind.SUBMIT]
        return [submission.attempt for submission in found if submission is not None]

    @property
    def aborts(self) -> list[int]:
        return [attempt for frame in self.sent if frame.kind == Kind.ABORT for attempt in decode_abort(frame)]


class Fleet:
    """A handle whose calls go where the client's bookings say, and the replicas behind it."""

    app_name = "app"
    deployment_name = "engine"

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.routing: set[asyncio.Task[None]] = set()
        self.calls: list[Call] = []
        self.full = False
        self.max_version = MAX_VERSION

    def options(self, *, method_name: str) -> Fleet:
        assert method_name == "generate"
        return self

    def remote(
        self,
        request: EngineRequest,
        *,
        ingress_id: str,
        attempt: int,
        waited_s: float,
        trace: dict[str, str] | None = None,
    ) -> Call:
        call = Call(request, attempt, waited_s, trace)
        self.calls.append(call)
        task = asyncio.get_running_loop().create_task(self._route(call, ingress_id))
        self.routing.add(task)
        task.add_done_callback(self.routing.discard)
        return call

    async def _route(self, call: Call, ingress_id: str) -> None:
        client = registry.find(ingress_id)
        assert client is not None
        refused = False
        while True:
            try:
                placement = client.place(call.attempt, refused=refused)
            except BookingGoneError as error:
                call.reply.set_exception(error)
                return
            if self.full:
                # As Serve's router when a replica does not take a call.
                await until(lambda: not self.full)
                refused = True
                continue
            if placement.replica_id is not None:
                self.replicas[placement.replica_id].calls.append(call)
                return
            await asyncio.sleep(0.01)

    def connect(self, endpoint: Endpoint, _ingress_id: str, secret: bytes, listener: LinkListener) -> Replica:
        assert secret == b"secret"
        self.replicas[endpoint.host].listener = listener
        return self.replicas[endpoint.host]

    def add(self, name: str) -> Replica:
        self.replicas[name] = Replica(self, name)
        return self.replicas[name]

    def publish(self, *names: str) -> None:
        registry.publish(KEY, tuple(self.replicas[name].info for name in names))

    async def first_call(self, count: int = 1) -> tuple[Replica, Call]:
        """The replica that got the `count`-th call, once it has."""
        await until(lambda: len(self.calls) >= count)
        call = self.calls[count - 1]
        await until(lambda: any(call in replica.calls for replica in self.replicas.values()))
        return next(replica for replica in self.replicas.values() if call in replica.calls), call


async def until(condition: Callable[[], object], timeout_s: float = 3.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of many kinds
            await asyncio.sleep(0.002)


class World:
    def __init__(self, options: ClientOptions = OPTIONS, balancer: Balancer | None = None) -> None:
        self.fleet = Fleet()
        self.balancer = balancer or Balancer()
        self.client = ReplicaSetClient(
            "model",
            self.fleet,
            options,
            balancer=self.balancer,
            connector=Connector(lambda: b"secret", self.fleet.connect),
        )

    async def start(self, *names: str) -> None:
        for name in names:
            self.fleet.add(name)
        self.fleet.publish(*names)
        assert not await self.client.wait_ready(0.02)
        await until(lambda: all(replica.listener for replica in self.fleet.replicas.values()))
        for replica in self.fleet.replicas.values():
            replica.come_up()
        if names:
            assert await self.client.wait_ready(1)

    def read(self, request: EngineRequest) -> asyncio.Task[list[SequenceOutput]]:
        return asyncio.get_running_loop().create_task(collect(self.client.generate(request)))

    def assert_clean(self) -> None:
        assert self.balancer.num_bookings == 0
        assert len(self.client._attempts) == 0
        assert self.client._journals == {}


@pytest.fixture
async def world() -> AsyncGenerator[World, None]:
    world = World()
    await world.start("a", "b")
    yield world
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def collect(stream: AsyncGenerator[list[SequenceOutput], None]) -> list[SequenceOutput]:
    outputs = []
    async with aclosing(stream):
        async for batch in stream:
            outputs += batch
    return outputs


def make_request(max_tokens: int = 8, **params: Any) -> EngineRequest:
    return EngineRequest("request", [3, 1, 4, 1, 5], SamplingParams(max_tokens=max_tokens, seed=7, **params))


def tokens_of(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [item for output in outputs if output.index == index for item in output.token_ids]


def wrapped(error: Exception) -> Exception:
    """As Ray hands over what a replica's method raised."""
    wrapper: Any = RayTaskError
    wrapped_error: Exception = wrapper("generate", "traceback", error).as_instanceof_cause()
    return wrapped_error


async def test_tokens_arrive_and_the_final_record_finishes(world: World) -> None:
    request = make_request()
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    for _ in range(3):
        replica.step(call)
    await asyncio.sleep(0.02)
    assert not reader.done()
    replica.step(call, finish="length")
    outputs = await reader
    assert tokens_of(outputs) == expected(request, 4)
    assert [output.request_finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {output.request_id for output in outputs} == {"request"}
    world.assert_clean()
    # The call is left to return by itself: nothing was wrong with it.
    assert not call.cancelled
    assert replica.aborts == []
    call.reply.set_result({})


async def test_the_calls_reply_does_not_finish_a_request(world: World) -> None:
    request = make_request()
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    replica.step(call)
    call.reply.set_result({})
    await asyncio.sleep(0.03)
    replica.step(call, finish="length")
    assert tokens_of(await reader) == expected(request, 2)


async def test_a_final_record_that_never_comes_is_a_failure(world: World) -> None:
    request = make_request()
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    replica.step(call)
    call.reply.set_result({})
    replica, call = await world.fleet.first_call(2)
    assert call.request.resumed == (ResumedSequence(tuple(expected(request, 1))),)
    replica.step(call, finish="length")
    assert tokens_of(await reader) == expected(request, 2)


@pytest.mark.parametrize("first_sign", ["call", "line"])
@pytest.mark.parametrize("num_before", [0, 5])
async def test_a_request_outlives_its_replica(world: World, first_sign: str, num_before: int) -> None:
    request = make_request(max_tokens=9, logprobs=1)
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    if num_before:
        replica.step(call, count=num_before)
    if first_sign == "call":
        call.reply.set_exception(ActorDiedError())
        await until(lambda: len(world.fleet.calls) == 2)
        replica.go_down()
    else:
        replica.go_down()
        call.reply.set_exception(ActorUnavailableError("gone", None))
    other, second = await world.fleet.first_call(2)
    assert other is not replica
    assert second.attempt != call.attempt
    assert [len(item.token_ids) for item in second.request.resumed] == ([num_before] if num_before else [])
    # What the dead replica had still on its way must not come twice.
    if first_sign == "call":
        replica.receive(_late_step(call))
    other.step(second, count=9 - num_before, finish="length")
    outputs = await reader
    assert tokens_of(outputs) == expected(request, 9)
    assert sum(output.request_finished for output in outputs) == 1
    assert len(world.fleet.calls) == 2


def _late_step(call: Call) -> bytes:
    message = StepMessage()
    message.add(call.attempt, SequenceOutput("", 0, [1, 2, 3], finish_reason="length"), 99)
    return message.encode()


async def test_only_unfinished_sequences_go_on_elsewhere(world: World) -> None:
    request = make_request(n=2)
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    message = StepMessage()
    replica.add_to(message, call, count=2, finish="stop", ends=False)
    replica.add_to(message, call, count=3, index=1)
    replica.receive(message.encode())
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    assert [(len(item.token_ids), item.finished) for item in second.request.resumed] == [(2, True), (3, False)]
    other.step(second, count=2, index=1, finish="length")
    outputs = await reader
    assert tokens_of(outputs, 0) == expected(request, 2, 0)
    assert tokens_of(outputs, 1) == expected(request, 5, 1)


async def test_logprobs_travel_with_their_sum(world: World) -> None:
    reader = world.read(make_request(logprobs=0))
    replica, call = await world.fleet.first_call()
    message = StepMessage()
    message.add(call.attempt, SequenceOutput("", 0, [5, 6], [TokenLogprobs(-1.0, ()), TokenLogprobs(-0.25, ())]), None)
    replica.receive(message.encode())
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    assert second.request.resumed[0].cumulative_logprob == -1.25
    other.step(second, finish="length")
    assert [entry.logprob for output in await reader for entry in output.logprobs or []] == [-1.0, -0.25]


@pytest.mark.parametrize("error", [PromptTooLongError("too long", param="prompt"), RequestError("bad", param="seed")])
async def test_a_refusal_reaches_the_reader_with_its_fields(world: World, error: RequestError) -> None:
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    call.reply.set_exception(wrapped(error))
    with pytest.raises(type(error)) as raised:
        await reader
    assert (str(raised.value), raised.value.param) == (str(error), error.param)
    assert not isinstance(raised.value, RayTaskError)
    assert len(world.fleet.calls) == 1


async def test_an_unforeseen_fault_on_a_replica_is_reported_and_not_repeated(world: World) -> None:
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    call.reply.set_exception(wrapped(KeyError("bug")))
    with pytest.raises(QuireError, match="the replica failed"):
        await reader
    assert len(world.fleet.calls) == 1


@pytest.mark.parametrize("error", [OverloadedError("full", retry_after_s=3), AdapterUnavailableError("gone")])
async def test_a_replica_that_is_full_or_lacks_the_adapter_sends_the_request_to_another_once(
    error: QuireError, world: World
) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    call.reply.set_exception(wrapped(error))
    other, second = await world.fleet.first_call(2)
    assert other is not replica
    other.step(second, finish="length")
    assert len(tokens_of(await reader)) == 1


async def test_overload_everywhere_is_told() -> None:
    world = World()
    await world.start("only")
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    call.reply.set_exception(wrapped(OverloadedError("full", retry_after_s=3)))
    with pytest.raises(OverloadedError) as raised:
        await reader
    assert raised.value.retry_after_s == 3
    await world.client.close()


async def test_a_dead_engine_is_left_and_excluded(world: World) -> None:
    request = make_request()
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    replica.step(call, count=2)
    replica.step(call, count=0, finish="error")
    other, second = await world.fleet.first_call(2)
    assert other is not replica
    other.step(second, count=3, finish="length")
    outputs = await reader
    assert tokens_of(outputs) == expected(request, 5)
    assert {output.finish_reason for output in outputs} <= {None, "length"}


async def test_a_request_that_fails_everywhere_ends(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    reader = world.read(make_request())
    for count in range(1, OPTIONS.max_attempts + 1):
        replica, call = await world.fleet.first_call(count)
        replica.go_down()
        replica.come_up()
    with pytest.raises(EngineDeadError, match=f"failed on {OPTIONS.max_attempts} replicas"):
        await reader
    assert call.attempt == OPTIONS.max_attempts


async def test_closing_the_generator_aborts_by_both_roads(world: World) -> None:
    stream = world.client.generate(make_request())
    first = asyncio.get_running_loop().create_task(anext(stream))
    replica, call = await world.fleet.first_call()
    replica.step(call)
    assert tokens_of(await first) == expected(call.request, 1)
    await stream.aclose()
    assert replica.aborts == [call.attempt]
    assert call.cancelled
    world.assert_clean()
    # Its last words find nobody.
    replica.step(call, count=0, finish="abort")


async def test_cancelling_the_reader_aborts(world: World) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert replica.aborts == [call.attempt]
    world.assert_clean()


async def test_a_late_reader_gets_its_tokens_coalesced(world: World) -> None:
    request = make_request(n=2)
    stream = world.client.generate(request)
    first = asyncio.get_running_loop().create_task(anext(stream))
    replica, call = await world.fleet.first_call()
    replica.step(call)
    await first
    for _ in range(3):
        replica.step(call)
        replica.step(call, index=1)
    batch = await anext(stream)
    assert [(output.index, len(output.token_ids)) for output in batch] == [(0, 3), (1, 3)]
    assert batch[0].token_ids == expected(request, 4)[1:]
    await stream.aclose()


async def test_a_reader_too_late_loses_its_request() -> None:
    world = World(OPTIONS._replace(max_unread_tokens=10))
    await world.start("a")
    stream = world.client.generate(make_request(max_tokens=100))
    first = asyncio.get_running_loop().create_task(anext(stream))
    replica, call = await world.fleet.first_call()
    replica.step(call)
    await first
    replica.step(call, count=10)
    replica.step(call, count=1)
    assert replica.aborts == [call.attempt]
    with pytest.raises(OverloadedError, match="11 tokens behind"):
        await anext(stream)
    await world.client.close()
    world.assert_clean()


async def test_a_count_that_does_not_agree_is_an_error(world: World) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    call.num_sent = 5
    replica.step(call, finish="length")
    with pytest.raises(QuireError, match="1 tokens came, the replica sent 6"):
        await reader


@pytest.mark.parametrize("sign", ["DRAINING", "unlisted"])
async def test_a_draining_replica_is_left_in_order(world: World, sign: str) -> None:
    """Waiting requests move at once, running ones at the deadline, and nobody sees a seam."""
    running_request, waiting_request = make_request(max_tokens=20), make_request(max_tokens=3)
    running = world.read(running_request)
    replica, running_call = await world.fleet.first_call()
    other = world.fleet.replicas["b" if replica.name == "a" else "a"]
    other.go_down()
    waiting = world.read(waiting_request)
    _, waiting_call = await world.fleet.first_call(2)
    assert waiting_call in replica.calls
    replica.step(running_call, count=4)
    other.come_up()
    if sign == "DRAINING":
        replica.receive(encode_draining(Draining(0.2, "test")))
    else:
        world.fleet.publish(other.name)
    to, moved = await world.fleet.first_call(3)
    assert (to, moved.request.request_id) == (other, "request")
    assert moved.request == waiting_request
    assert waiting_call.cancelled
    other.step(moved, count=3, finish="length")
    assert tokens_of(await waiting) == expected(waiting_request, 3)
    assert not running_call.cancelled
    replica.step(running_call, count=2)
    to, resumed = await world.fleet.first_call(4)
    assert to is other
    assert len(resumed.request.resumed[0].token_ids) == 6
    assert running_call.attempt in replica.aborts
    other.step(resumed, count=2, finish="length")
    assert tokens_of(await running) == expected(running_request, 8)
    # Being moved is no failure.
    assert world.client.state().num_replicas == 1
    assert replica.redialing == (sign == "DRAINING")


async def test_waiting_requests_leave_a_draining_replica_when_another_comes() -> None:
    world = World()
    await world.start("a")
    reader = world.read(make_request())
    _, call = await world.fleet.first_call()
    world.fleet.replicas["a"].receive(encode_draining(Draining(30.0, "test")))
    assert not world.client.state().ready
    assert not call.cancelled
    other = world.fleet.add("b")
    world.fleet.publish("a", "b")
    await until(lambda: other.listener)
    other.come_up()
    to, second = await world.fleet.first_call(2)
    assert to is other
    other.step(second, finish="length")
    await reader
    await world.client.close()


async def test_with_no_replica_requests_wait_for_one() -> None:
    world = World()
    await world.start()
    assert world.client.state() == ("model", False, 0, "starting: no replica is ready yet", None, None)
    reader = world.read(make_request())
    await until(lambda: world.fleet.calls)
    replica = world.fleet.add("late")
    world.fleet.publish("late")
    await until(lambda: replica.listener)
    assert "connecting" in world.client.state().detail
    replica.come_up()
    assert world.client.state() == ("model", True, 1, "ready", 512, None)
    _, call = await world.fleet.first_call()
    replica.step(call, finish="length")
    assert len(tokens_of(await reader)) == 1
    await world.client.close()


async def test_a_simulated_device_is_named() -> None:
    world = World()
    await world.start()
    replica = world.fleet.add("simulated")
    replica.info = replica.info._replace(metadata={**replica.info.metadata, "simulated": "h200"})
    world.fleet.publish("simulated")
    await until(lambda: replica.listener)
    replica.come_up()
    state = world.client.state()
    assert state.simulated == "h200"
    assert state.detail == "ready, SIMULATED on h200: its tokens mean nothing"
    await world.client.close()


async def test_with_no_replica_for_too_long_requests_fail() -> None:
    world = World(OPTIONS._replace(placement_timeout_s=0.05))
    await world.start()
    with pytest.raises(EngineDeadError, match=r"no replica of model was ready within 0\.05 s"):
        await world.read(make_request())
    await world.client.close()
    world.assert_clean()


async def test_requests_need_not_wait_for_replicas_that_cannot_start(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    await world.start()
    world.client.starts_failed(StartFailures(7, ""))
    reader = world.read(make_request())
    await until(lambda: world.fleet.calls)
    world.client.starts_failed(StartFailures(8, "no such folder"))
    assert world.client.state().detail.endswith("; the last start failed: no such folder")
    await asyncio.sleep(0)
    assert not reader.done(), "one may be chance"
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    try:
        world.client.starts_failed(StartFailures(9, "no such folder"))
    finally:
        logging.getLogger("ray.serve").removeHandler(caplog.handler)
    with pytest.raises(EngineDeadError, match="no replica of model could start"):
        await reader
    assert "no replica can start: no such folder" in caplog.text
    # The next one has starts of its own to wait for.
    reader = world.read(make_request())
    await until(lambda: len(world.fleet.calls) == 2)
    world.client.starts_failed(StartFailures(10, "no such folder"))
    replica = world.fleet.add("well")
    world.fleet.publish("well")
    await until(lambda: replica.listener)
    replica.come_up()
    world.client.starts_failed(StartFailures(11, "another cannot start"))
    call = world.fleet.calls[-1]
    await until(lambda: call in replica.calls)
    replica.step(call, finish="length")
    assert len(tokens_of(await reader)) == 1
    assert world.client.state().detail == "ready"
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def test_a_model_that_scales_to_zero_is_ready_at_zero() -> None:
    world = World()
    assert not await world.client.wait_ready(0.02), "nothing is known of its deployment"
    registry.describe(KEY, scales_to_zero=True)
    assert await world.client.wait_ready(1)
    assert world.client.state()[1:3] == (True, 0)
    later = World()
    assert await later.client.wait_ready(1), "a client that comes later is told"
    await later.client.close()
    # Its config has changed since: the replicas that were started with it say so.
    replica = world.fleet.add("changed")
    replica.info = replica.info._replace(metadata={**replica.info.metadata, "scales_to_zero": False})
    world.fleet.publish("changed")
    await until(lambda: replica.listener)
    world.fleet.publish()
    await until(lambda: not world.client.state().ready)
    registry.describe(KEY, scales_to_zero=False)
    await world.client.close()


async def test_demand_is_told_to_replicas_that_want_it_whatever_becomes_of_the_request() -> None:
    world = World()
    await world.start("wants", "other")
    wants, other = world.fleet.replicas.values()
    metadata: Any = wants.info.metadata
    metadata["wants_demand"] = True
    world.fleet.publish("wants", "other")
    reader = world.read(make_request())
    await world.fleet.first_call()
    reader.cancel()

    def told() -> list[DemandShare]:
        return [decode_demand(frame) for frame in wants.sent if frame.kind == Kind.DEMAND]

    await until(lambda: sum(share.prompt_tokens for share in told()) == 5.0)
    assert {share.share for share in told()} == {1.0}
    assert sum(share.requests for share in told()) == 1.0
    assert not any(frame.kind == Kind.DEMAND for frame in other.sent)
    await world.client.close()


async def test_closing_the_client_ends_what_runs(world: World) -> None:
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    await world.client.close()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await reader
    assert replica.aborts == [call.attempt]
    assert replica.closed
    with pytest.raises(EngineDeadError, match="shutting down"):
        await world.read(make_request())


async def test_a_request_keeps_its_place_when_it_moves(world: World) -> None:
    reader = world.read(make_request())
    replica, _ = await world.fleet.first_call()
    await asyncio.sleep(0.05)
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    assert second.waited_s >= 0.05
    other.step(second, finish="length")
    await reader


async def test_a_request_goes_where_its_prompt_is_cached(world: World) -> None:
    request = EngineRequest("request", list(range(100)), SamplingParams(max_tokens=8, seed=7))
    log = BlockLog()
    log.add(BlockChanges(list(prompt_chain(request, "model", 16)), []))
    cached = world.fleet.replicas["b"]
    assert [frame.kind for frame in cached.sent] == [Kind.SYNC]
    cached.receive(log.since(0))
    for count in range(1, 4):
        reader = world.read(request)
        replica, call = await world.fleet.first_call(count)
        assert replica is cached
        replica.step(call, finish="length")
        await reader
    # A message that is missing is asked for, and until it comes the replica counts as holding nothing.
    log.add(BlockChanges([b"x" * 16], []))
    cached.receive(log.add(BlockChanges([b"y" * 16], [])))
    assert [decode_sync(frame) for frame in cached.sent if frame.kind == Kind.SYNC] == [0, 1]
    cached.receive(log.since(1))
    reader = world.read(request)
    replica, call = await world.fleet.first_call(4)
    assert replica is cached
    replica.step(call, finish="length")
    await reader


async def test_a_request_held_back_is_called_when_the_replica_comes_free() -> None:
    world = World(balancer=Balancer(hold_s=0.05))
    await world.start("a")
    replica = world.fleet.replicas["a"]
    replica.receive(encode_load(LoadReport(num_waiting_tokens=200, prefill_tokens_per_s=1000.0)))
    reader = world.read(make_request())
    await asyncio.sleep(0.06)
    assert world.fleet.calls == []
    assert world.balancer.num_held == 1
    _, call = await world.fleet.first_call()
    replica.step(call, finish="length")
    assert tokens_of(await reader) == expected(make_request(), 1)
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def test_a_reader_that_leaves_while_its_request_is_held_back() -> None:
    world = World(balancer=Balancer(hold_s=0.05))
    await world.start("a")
    replica = world.fleet.replicas["a"]
    replica.receive(encode_load(LoadReport(num_waiting_tokens=2000, prefill_tokens_per_s=1000.0)))
    reader = world.read(make_request())
    await until(lambda: world.balancer.num_held)
    reader.cancel()
    await until(lambda: not world.balancer.num_held)
    assert world.fleet.calls == []
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def test_a_request_that_waited_in_vain_is_refused_and_told_when_to_come_again() -> None:
    settings = AdmissionSettings({"default": ClassSettings(0, 0.3)})
    world = World(balancer=Balancer(admission=settings))
    await world.start("a")
    replica = world.fleet.replicas["a"]
    # Two seconds of prompt, and never less.
    replica.receive(encode_load(LoadReport(num_waiting_tokens=2000, prefill_tokens_per_s=1000.0)))
    waiting = collect(world.client.generate(make_request(), None, terms_of_class(settings)))
    with pytest.raises(OverloadedError, match="its turn did not come in time; try again in") as late:
        await waiting
    assert late.value.retry_after_s >= 1
    assert world.fleet.calls == []
    assert world.balancer.admission_state().counts.refused == {("default", "late"): 1}
    await world.client.close()
    world.fleet.publish()
    world.assert_clean()


async def test_one_sequence_is_stopped_and_the_others_go_on(world: World) -> None:
    request = make_request(n=2)
    stream = world.client.generate(request)
    reader = asyncio.get_running_loop().create_task(collect(stream))
    replica, call = await world.fleet.first_call()
    replica.step(call, index=0)
    replica.step(call, index=1)
    await asyncio.sleep(0.01)
    world.client.stop("request", 0)
    world.client.stop("request", 0)
    assert [decode_stop(frame) for frame in replica.sent if frame.kind == Kind.STOP] == [(call.attempt, 0)]
    message = StepMessage()
    # The replica's word for it is "abort"; that is no sign that it gives the request up.
    replica.add_to(message, call, count=0, finish="abort", index=0, ends=False)
    replica.receive(message.encode())
    replica.step(call, index=1, finish="length")
    assert tokens_of(await reader, 1) == expected(request, 2, index=1)
    assert len(world.fleet.calls) == 1
    world.assert_clean()
    world.client.stop("request", 1)


async def test_a_stopped_sequence_does_not_go_on_elsewhere(world: World) -> None:
    request = make_request(n=2)
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    replica.step(call, index=0)
    replica.step(call, index=1)
    await asyncio.sleep(0.01)
    world.client.stop("request", 0)
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    assert [sequence.finished for sequence in second.request.resumed] == [True, False]
    other.step(second, index=1, finish="length")
    assert tokens_of(await reader, 1) == expected(request, 2, index=1)
    world.assert_clean()


async def test_a_receipt_says_what_was_expected_and_what_came(world: World) -> None:
    request = EngineRequest("request", list(range(100)), SamplingParams(max_tokens=8, seed=7))
    log = BlockLog()
    log.add(BlockChanges(list(prompt_chain(request, "model", 16)), []))
    world.fleet.replicas["b"].receive(log.since(0))
    receipt = Receipt("request")
    reader = asyncio.get_running_loop().create_task(collect(world.client.generate(request, receipt)))
    replica, call = await world.fleet.first_call()
    assert receipt.as_dict()["replica"] is None
    message = StepMessage()
    output = SequenceOutput("", 0, [token(request, 0, 0)], finish_reason="length", num_cached_tokens=80, waited_s=2.5)
    message.add(call.attempt, output, 1)
    replica.receive(message.encode())
    await reader
    assert (receipt.replica, receipt.num_attempts) == ("b", 1)
    assert (receipt.expected_cached_tokens, receipt.cached_tokens) == (96, 80)
    assert receipt.predicted_wait_s == 0.0
    # The replica counts from the request's arrival in the ingress; its placement was a moment later.
    assert receipt.wait_s == pytest.approx(2.5, abs=0.2)
    assert receipt.as_dict()["predicted_cost_s"] is not None


@pytest.mark.parametrize(("num_cached", "num_wrong"), [(96, 0), (81, 0), (80, 1), (0, 1)])
async def test_a_route_is_wrong_if_a_block_that_was_counted_on_is_missing(
    world: World, num_cached: int, num_wrong: int
) -> None:
    request = EngineRequest("request", list(range(100)), SamplingParams(max_tokens=8, seed=7))
    log = BlockLog()
    log.add(BlockChanges(list(prompt_chain(request, "model", 16)), []))
    world.fleet.replicas["b"].receive(log.since(0))
    reader = world.read(request)
    replica, call = await world.fleet.first_call()
    assert world.client.telemetry().num_bookings == 1
    message = StepMessage()
    output = SequenceOutput("", 0, [token(request, 0, 0)], finish_reason="length", num_cached_tokens=num_cached)
    message.add(call.attempt, output, 1)
    replica.receive(message.encode())
    await reader
    told = world.client.telemetry()
    assert told.routes == RouteCounts(placed=1, expected_cached_tokens=96, wrong=num_wrong)
    assert (told.num_bookings, told.num_replicas) == (0, 2)


async def test_a_resubmission_is_counted_and_a_lost_replicas_counters_go_with_it(world: World) -> None:
    for name in ("a", "b"):
        world.fleet.replicas[name].receive(encode_counters(ReplicaCounters(num_steps=3)))
    assert world.client.telemetry().replicas.keys() == {"a", "b"}
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    replica.step(call)
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    other.step(second, finish="length")
    await reader
    told = world.client.telemetry()
    assert (told.routes.placed, told.routes.resubmitted, told.num_replicas) == (2, 1, 1)
    assert told.replicas == {other.name: ReplicaCounters(num_steps=3)}


async def test_a_receipt_is_of_the_last_attempt(world: World) -> None:
    receipt = Receipt("request")
    reader = asyncio.get_running_loop().create_task(collect(world.client.generate(make_request(), receipt)))
    replica, call = await world.fleet.first_call()
    replica.step(call)
    replica.go_down()
    other, second = await world.fleet.first_call(2)
    other.step(second, finish="length")
    await reader
    assert (receipt.replica, receipt.num_attempts) == (other.name, 2)


async def test_a_booked_request_goes_ahead_of_its_call(world: World) -> None:
    request = make_request()
    reader = world.read(request)
    await until(lambda: world.fleet.calls)
    replica, call = await world.fleet.first_call()
    (frame,) = (frame for frame in replica.sent if frame.kind == Kind.SUBMIT)
    submission = decode_submit(frame)
    assert submission is not None
    assert (submission.attempt, submission.waited_s) == (call.attempt, call.waited_s)
    assert submission.request.prompt_token_ids == list(request.prompt_token_ids)
    assert submission.request.sampling_params == request.sampling_params
    replica.step(call, count=2, finish="length")
    assert tokens_of(await reader) == expected(request, 2)


class Submitted(NamedTuple):
    """A request that a replica has by SUBMIT, and no call for it."""

    world: World
    request: EngineRequest
    reader: asyncio.Task[list[SequenceOutput]]
    replica: Replica
    attempt: int

    def step(self, *, ends: bool) -> None:
        message = StepMessage()
        output = SequenceOutput("", 0, [token(self.request, 0, 0)], finish_reason="length" if ends else None)
        message.add(self.attempt, output, 1 if ends else None)
        self.replica.receive(message.encode())


@pytest.fixture
async def submitted() -> AsyncGenerator[Submitted, None]:
    world = World(OPTIONS._replace(call_after_s=60.0))
    await world.start("a", "b")
    request = make_request()
    reader = world.read(request)
    await until(lambda: any(replica.submitted for replica in world.fleet.replicas.values()))
    replica = next(replica for replica in world.fleet.replicas.values() if replica.submitted)
    assert world.fleet.calls == []
    yield Submitted(world, request, reader, replica, replica.submitted[0])
    await world.client.close()
    world.assert_clean()


async def test_the_call_of_a_submitted_request_follows_its_first_token(submitted: Submitted) -> None:
    submitted.step(ends=False)
    replica, call = await submitted.world.fleet.first_call()
    assert (replica, call.attempt) == (submitted.replica, submitted.attempt)
    assert call.request.resumed == ()
    call.num_sent = call.positions[0] = 1
    replica.step(call, finish="length")
    assert tokens_of(await submitted.reader) == expected(submitted.request, 2)


async def test_what_ends_with_its_first_token_is_not_called_for(submitted: Submitted) -> None:
    submitted.step(ends=True)
    assert tokens_of(await submitted.reader) == expected(submitted.request, 1)
    await asyncio.sleep(0.03)
    assert submitted.world.fleet.calls == []
    assert submitted.replica.aborts == []


async def test_a_refused_submission_is_called_for_at_once_to_hear_why(submitted: Submitted) -> None:
    submitted.replica.receive(encode_refused([submitted.attempt, 77]))
    _, call = await submitted.world.fleet.first_call()
    call.reply.set_exception(wrapped(PromptTooLongError("too long")))
    with pytest.raises(PromptTooLongError):
        await submitted.reader


async def test_a_reader_that_leaves_before_the_call_spares_it(submitted: Submitted) -> None:
    submitted.reader.cancel()
    await until(lambda: submitted.replica.aborts == [submitted.attempt])
    await asyncio.sleep(0.03)
    assert submitted.world.fleet.calls == []


async def test_a_replica_lost_before_the_call_has_its_request_go_on_elsewhere(submitted: Submitted) -> None:
    submitted.replica.go_down()
    other = next(replica for replica in submitted.world.fleet.replicas.values() if replica is not submitted.replica)
    await until(lambda: other.submitted)
    there = submitted._replace(replica=other, attempt=other.submitted[0])
    there.step(ends=True)
    assert tokens_of(await submitted.reader) == expected(submitted.request, 1)


async def test_an_older_replica_gets_the_call_alone() -> None:
    world = World()
    world.fleet.max_version = SUBMIT_VERSION - 1
    await world.start("a")
    reader = world.read(make_request())
    replica, call = await world.fleet.first_call()
    assert replica.submitted == []
    replica.step(call, finish="length")
    await reader
    await world.client.close()


async def test_a_call_that_its_replica_turns_away_goes_on_in_another_attempt(world: World) -> None:
    request = make_request()
    world.fleet.full = True
    reader = world.read(request)
    await until(lambda: world.fleet.calls and any(replica.submitted for replica in world.fleet.replicas.values()))
    first = world.fleet.calls[0]
    replica = next(replica for replica in world.fleet.replicas.values() if replica.submitted)
    # It has begun already: what it sent before Serve refused its call is kept.
    replica.step(first, count=2)
    world.fleet.full = False
    second_replica, second = await world.fleet.first_call(2)
    assert replica.aborts == [first.attempt]
    assert [len(sequence.token_ids) for sequence in second.request.resumed] == [2]
    # By its call alone, or a full fleet would be sent everything again and again.
    assert second.attempt not in second_replica.submitted
    replica.step(first)
    second_replica.step(second, finish="length")
    assert tokens_of(await reader) == expected(request, 3)
