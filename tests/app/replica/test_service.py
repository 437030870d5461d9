"""A replica's service over real sockets, with an engine that is stepped by hand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from app.replica.service import ReplicaService
from app.replica.stream_server import StreamServer
from app.telemetry import spans
from app.transport.frames import Frame
from app.transport.link import Endpoint, Link, ReplicaLink
from app.transport.messages import (
    Kind,
    LoadReport,
    StepRow,
    decode_draining,
    decode_load,
    decode_refused,
    decode_step,
    encode_abort,
    encode_stop,
)
from app.transport.submit_messages import Submission, encode_submit
from engine.errors import AdapterUnavailableError, EngineDeadError, PromptTooLongError, QuireError
from engine.memory import BlockChanges, MemoryUsage
from engine.outputs import EngineAccounts, EngineStats, SequenceOutput
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.app.telemetry.collected import Collected, attributes_of

pytestmark = pytest.mark.anyio

SECRET = b"s" * 32


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class HandDrivenEngine:
    """AsyncLLMEngine's face; a step happens when the test says so."""

    def __init__(self) -> None:
        self.requests: dict[str, EngineRequest] = {}
        self.aborted: list[str] = []
        self.stopped: list[tuple[str, int]] = []
        self.dead: EngineDeadError | None = None
        self.shut_down = False
        self._stats = EngineStats(100, 100, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._accounts = EngineAccounts(self._stats, MemoryUsage(0, 0, 0, 0, 0, 1600, 0, 0))
        self._on_step: Callable[[list[SequenceOutput]], None] = lambda _: None

    def start(
        self,
        on_step: Callable[[list[SequenceOutput]], None] | None = None,
        on_blocks: Callable[[BlockChanges], None] | None = None,
    ) -> None:
        assert on_step is not None
        assert on_blocks is not None
        self._on_step = on_step
        self.publish_blocks = on_blocks

    def add_request(self, request: EngineRequest) -> None:
        if len(request.prompt_token_ids) > 10:
            raise PromptTooLongError("too long", param="prompt")
        assert request.request_id not in self.requests
        self.requests[request.request_id] = request

    def abort(self, request_id: str, index: int | None = None) -> None:
        if index is not None:
            self.stopped.append((request_id, index))
            return
        self.aborted.append(request_id)
        if request_id in self.requests:
            self.step((request_id, [], "abort"))

    def stats(self) -> EngineStats:
        return self._stats

    def accounts(self) -> EngineAccounts:
        return self._accounts

    def check_health(self) -> None:
        if self.dead is not None:
            raise self.dead

    def shutdown(self) -> None:
        self.shut_down = True
        for key in list(self.requests):
            self.abort(key)

    def step(self, *rows: tuple[str, list[int], Any]) -> None:
        outputs = []
        for key, tokens, finish in rows:
            outputs.append(SequenceOutput(key, 0, tokens, None, finish, None, 3, finish is not None))
            if finish is not None:
                del self.requests[key]
        running = len(self.requests)
        self._stats = replace(self._stats, num_steps=self._stats.num_steps + 1, num_running=running)
        self._on_step(outputs)

    def fail(self, key: str, error: QuireError) -> None:
        """End a request as one that fails alone."""
        del self.requests[key]
        self._on_step([SequenceOutput(key, 0, [], finish_reason="error", request_finished=True, error=error)])


class Ingress:
    """Hears one replica."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.down = False

    def link_frame(self, _link: Link, frame: Frame) -> None:
        self.frames.append(frame)

    def link_down(self, _link: Link, _cause: Exception | None) -> None:
        self.down = True

    def steps(self) -> list[list[StepRow]]:
        return [decode_step(frame) for frame in self.frames if frame.kind == Kind.STEP]

    def loads(self) -> list[LoadReport]:
        return [decode_load(frame) for frame in self.frames if frame.kind == Kind.LOAD]

    def admitted(self) -> list[int]:
        return [attempt for load in self.loads() for attempt in load.admitted]


class World:
    def __init__(self) -> None:
        self.engine = HandDrivenEngine()
        self.server = StreamServer("127.0.0.1", "epoch", SECRET)
        self.collected = Collected()
        self.service = ReplicaService(self.engine, self.server, "tiny", self.collected.tracing)
        self.service.start()
        self.ingresses: dict[str, tuple[Ingress, ReplicaLink]] = {}

    async def connect(self, name: str) -> Ingress:
        ingress = Ingress()
        link = ReplicaLink(Endpoint("127.0.0.1", self.server.port, "epoch"), name, SECRET, ingress)
        self.ingresses[name] = (ingress, link)
        await until(lambda: any(frame.kind == Kind.LOAD for frame in ingress.frames))
        return ingress

    def call(
        self, ingress: str, attempt: int, prompt: int = 3, trace: dict[str, str] | None = None
    ) -> asyncio.Task[dict[str, Any]]:
        request = EngineRequest(f"request-{attempt}", [1] * prompt, SamplingParams())
        call = self.service.generate(request, ingress_id=ingress, attempt=attempt, waited_s=2.0, trace=trace)
        return asyncio.get_running_loop().create_task(call)

    def submit(self, ingress: str, attempt: int, prompt: int = 3) -> None:
        request = EngineRequest(f"request-{attempt}", [1] * prompt, SamplingParams())
        self.ingresses[ingress][1].send(encode_submit(Submission(attempt, request, 2.0)))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for _, link in world.ingresses.values():
        link.close()
    await asyncio.to_thread(world.service.close)
    assert world.service._streams == {}


async def until(condition: Callable[[], object], timeout_s: float = 3.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - conditions of other threads
            await asyncio.sleep(0.002)


async def test_a_request_that_fails_alone_fails_its_call_and_the_others_go_on(world: World) -> None:
    left = await world.connect("left")
    carrier = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"}
    call, other = world.call("left", 1, trace=carrier), world.call("left", 2)
    world.submit("left", 3)
    await until(lambda: len(world.engine.requests) == 3)
    error = AdapterUnavailableError("adapter sql cannot be loaded: it is gone")
    world.engine.fail("left/1", error)
    world.engine.fail("left/3", error)
    for failed in (call, world.call("left", 3)):
        with pytest.raises(AdapterUnavailableError, match="adapter sql cannot be loaded"):
            await failed
    world.engine.step(("left/2", [7], "stop"))
    assert (await other)["finish_reasons"] == ["stop"]
    assert [[row.attempt for row in step] for step in left.steps() if step] == [[2]], "the socket says nothing of them"
    await until(lambda: world.collected.spans)
    (span,) = world.collected.spans
    assert span.status.description == str(error)


async def test_one_frame_a_step_and_ingress(world: World) -> None:
    left, right = await world.connect("left"), await world.connect("right")
    calls = [world.call("left", 1), world.call("left", 2), world.call("right", 1)]
    await until(lambda: len(world.engine.requests) == 3)
    for _ in range(3):
        world.engine.step(("left/1", [11], None), ("left/2", [21, 22], None), ("right/1", [31], None))
    world.engine.step(("left/1", [12], "stop"), ("left/2", [], None), ("right/1", [32], "length"))
    await until(lambda: len(left.steps()) == 4 and len(right.steps()) == 4)
    assert [[(row.attempt, row.output.token_ids) for row in step] for step in left.steps()] == [
        *[[(1, [11]), (2, [21, 22])]] * 3,
        [(1, [12]), (2, [])],
    ]
    last = left.steps()[-1][0]
    assert (last.final_count, last.output.finish_reason) == (4, "stop")
    # The engine repeats the number of cached tokens; the wire says it once.
    assert [step[0].output.num_cached_tokens for step in left.steps()] == [3, 0, 0, 0]
    assert await calls[2] == {
        "request_id": "request-1",
        "attempt": 1,
        "num_output_tokens": 4,
        "num_cached_tokens": 3,
        "finish_reasons": ["length"],
    }
    assert not calls[1].done()
    calls[1].cancel()


async def test_the_load_says_whom_it_includes(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 7)
    await until(lambda: world.engine.requests)
    await asyncio.sleep(0.03)
    # No step has begun since it came: the engine's numbers cannot include it.
    assert ingress.admitted() == []
    world.engine.step(("ingress/7", [1], None))
    await until(lambda: ingress.admitted() == [7])
    world.engine.step(("ingress/7", [2], "stop"))
    await call
    assert ingress.admitted() == [7]


async def test_a_moved_request_keeps_its_age(world: World) -> None:
    await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    age_s = time.monotonic() - world.engine.requests["ingress/1"].arrival_time
    assert 2.0 <= age_s < 3.0
    call.cancel()


async def test_an_abort_ends_the_request_and_its_call(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    world.ingresses["ingress"][1].send(encode_abort([1]))
    assert (await call)["finish_reasons"] == ["abort"]
    await until(ingress.steps)
    assert ingress.steps()[-1][0].final_count == 0


async def test_an_abort_that_overtakes_its_call_is_remembered(world: World) -> None:
    await world.connect("ingress")
    world.ingresses["ingress"][1].send(encode_abort([5]))
    await until(lambda: world.service._aborts["ingress"])
    assert (await world.call("ingress", 5))["finish_reasons"] == ["abort"]


async def test_cancelling_the_call_aborts_at_once(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert world.engine.aborted == ["ingress/1"]
    await until(ingress.steps)
    assert ingress.steps()[-1][0].output.finish_reason == "abort"


async def test_a_lost_ingress_frees_what_ran_for_it(world: World) -> None:
    await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    world.ingresses["ingress"][1].close()
    assert (await call)["finish_reasons"] == ["abort"]
    assert world.engine.requests == {}
    with pytest.raises(EngineDeadError, match="not connected"):
        await world.call("ingress", 2)


async def test_a_refused_request_leaves_nothing(world: World) -> None:
    await world.connect("ingress")
    with pytest.raises(PromptTooLongError):
        await world.call("ingress", 1, prompt=11)
    assert world.service._streams == {}


async def test_a_dead_engine_fails_its_calls_and_moves_its_requests(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    world.engine.dead = EngineDeadError("out of memory")
    with pytest.raises(EngineDeadError):
        await call
    await until(lambda: any(frame.kind == Kind.DRAINING for frame in ingress.frames))
    draining = next(decode_draining(frame) for frame in ingress.frames if frame.kind == Kind.DRAINING)
    assert draining == (0.0, "out of memory")
    with pytest.raises(EngineDeadError, match="out of memory"):
        await world.call("ingress", 2)
    with pytest.raises(EngineDeadError):
        world.service.check_health()


async def test_closing_tells_the_ingresses_to_move(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    await asyncio.to_thread(world.service.close)
    assert world.engine.shut_down
    assert (await call)["finish_reasons"] == ["abort"]
    await until(lambda: ingress.down)
    kinds = [frame.kind for frame in ingress.frames]
    assert kinds.index(Kind.DRAINING) < kinds.index(Kind.STEP)


async def test_on_step_costs_the_engine_microseconds(world: World) -> None:
    await world.connect("ingress")
    outputs = [SequenceOutput(f"nobody/{number}", 0, [1]) for number in range(256)]
    times = []
    for _ in range(200):
        began = time.perf_counter()
        world.service._on_step(outputs)
        times.append(time.perf_counter() - began)
    assert sorted(times)[100] < 200e-6


async def test_one_sequence_is_stopped_and_the_request_goes_on(world: World) -> None:
    ingress = await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    world.ingresses["ingress"][1].send(encode_stop(1, 2) + encode_stop(99, 0))
    await until(lambda: world.engine.stopped)
    assert world.engine.stopped == [("ingress/1", 2)]
    assert not call.done()
    world.engine.step(("ingress/1", [1], "length"))
    assert (await call)["finish_reasons"] == ["length"]
    assert ingress.down is False


TRACE = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}


async def test_only_a_sampled_request_keeps_a_timeline_and_makes_spans(world: World) -> None:
    await world.connect("ingress")
    calls = [world.call("ingress", 1), world.call("ingress", 2, trace=TRACE)]
    await until(lambda: len(world.engine.requests) == 2)
    assert world.engine.requests["ingress/1"].timeline is None
    timeline = world.engine.requests["ingress/2"].timeline
    assert timeline is not None
    timeline.started(time.monotonic())
    timeline.end(time.monotonic())
    world.engine.step(("ingress/1", [1], "stop"), ("ingress/2", [1], "length"))
    await asyncio.gather(*calls)
    await until(lambda: len(world.collected.spans) == 2)
    assert world.collected.tree() == {"elsewhere": ["engine"], "engine": ["engine queue"]}
    attributes = attributes_of(world.collected.named("engine"))
    assert (attributes[spans.REQUEST_MODEL], attributes[spans.ENGINE_REQUEST_ID]) == ("tiny", "request-2")
    assert attributes[spans.RESPONSE_FINISH_REASONS] == ["length"]


async def test_a_refusal_is_a_failed_span(world: World) -> None:
    await world.connect("ingress")
    with pytest.raises(PromptTooLongError):
        await world.call("ingress", 1, prompt=11, trace=TRACE)
    assert world.collected.named("engine").status.description == "too long"


async def test_an_engine_that_dies_ends_the_spans_of_its_requests(world: World) -> None:
    await world.connect("ingress")
    call = world.call("ingress", 1, trace=TRACE)
    await until(lambda: world.engine.requests)
    world.engine.dead = EngineDeadError("out of memory")
    with pytest.raises(EngineDeadError):
        await call
    await until(lambda: world.collected.spans)
    assert world.collected.named("engine").status.description == "out of memory"


async def test_a_submitted_request_begins_before_its_call_which_then_waits_for_it(world: World) -> None:
    ingress = await world.connect("ingress")
    world.submit("ingress", 1)
    await until(lambda: world.engine.requests)
    assert 2.0 <= time.monotonic() - world.engine.requests["ingress/1"].arrival_time < 3.0
    world.engine.step(("ingress/1", [4], None))
    await until(ingress.steps)
    call = world.call("ingress", 1)
    await asyncio.sleep(0.01)
    assert not call.done()
    world.engine.step(("ingress/1", [5], "stop"))
    assert (await call)["num_output_tokens"] == 2
    await until(lambda: ingress.admitted() == [1])


async def test_a_call_later_than_the_end_of_its_request_gets_the_record(world: World) -> None:
    ingress = await world.connect("ingress")
    world.submit("ingress", 1)
    await until(lambda: world.engine.requests)
    world.engine.step(("ingress/1", [4], "stop"))
    await until(ingress.steps)
    record = await world.call("ingress", 1)
    assert (record["num_output_tokens"], record["finish_reasons"]) == (1, ["stop"])
    assert world.engine.requests == {}
    assert world.service._unclaimed == {}


async def test_a_submission_later_than_its_call_begins_nothing(world: World) -> None:
    await world.connect("ingress")
    call = world.call("ingress", 1)
    await until(lambda: world.engine.requests)
    world.submit("ingress", 1)
    world.submit("ingress", 2)
    await until(lambda: "ingress/2" in world.engine.requests)
    world.engine.step(("ingress/1", [4], "stop"), ("ingress/2", [4], "stop"))
    await call
    world.submit("ingress", 1)
    world.submit("ingress", 3)
    await until(lambda: world.engine.requests)
    assert list(world.engine.requests) == ["ingress/3"]
    world.engine.step(("ingress/3", [4], "stop"))


async def test_a_submission_that_the_engine_refuses_leaves_the_refusal_to_the_call(world: World) -> None:
    ingress = await world.connect("ingress")
    world.submit("ingress", 1, prompt=11)
    world.submit("ingress", 2)
    await until(lambda: world.engine.requests)
    await until(lambda: [decode_refused(frame) for frame in ingress.frames if frame.kind == Kind.REFUSED] == [(1,)])
    with pytest.raises(PromptTooLongError):
        await world.call("ingress", 1, prompt=11)
    world.engine.step(("ingress/2", [4], "stop"))


async def test_an_abort_ends_what_was_submitted_and_the_call_that_comes_later(world: World) -> None:
    ingress = await world.connect("ingress")
    world.submit("ingress", 1)
    await until(lambda: world.engine.requests)
    world.ingresses["ingress"][1].send(encode_abort([1]))
    await until(ingress.steps)
    assert world.engine.requests == {}
    assert (await world.call("ingress", 1))["finish_reasons"] == ["abort"]
    world.submit("ingress", 1)
    world.submit("ingress", 2)
    await until(lambda: world.engine.requests)
    assert list(world.engine.requests) == ["ingress/2"]
    world.engine.step(("ingress/2", [4], "stop"))


async def test_what_has_ended_without_its_call_is_forgotten_in_silence(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ingress = await world.connect("ingress")
    world.submit("ingress", 1)
    await until(lambda: world.engine.requests)
    world.engine.step(("ingress/1", [4], "stop"))
    await until(ingress.steps)
    assert world.service._unclaimed
    monkeypatch.setattr("app.replica.service._CALL_WITHIN_S", 0.0)
    await until(lambda: not world.service._unclaimed)
    assert caplog.records == []


async def test_what_was_submitted_is_given_up_if_no_call_comes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.replica.service._CALL_WITHIN_S", 0.02)
    ingress = await world.connect("ingress")
    world.submit("ingress", 1)
    await until(ingress.steps)
    assert ingress.steps()[-1][0].output.finish_reason == "abort"
    assert world.service._unclaimed == {}
