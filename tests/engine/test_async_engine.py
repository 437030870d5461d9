from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from engine.async_engine import AsyncLLMEngine
from engine.errors import EngineDeadError, PromptTooLongError, RequestError
from engine.outputs import SequenceOutput
from engine.sampling_params import SamplingParams
from engine.scheduling import SamplerOutput, SchedulerOutput
from tests.engine.doubles import CheckingExecutor, expected_tokens, make_engine, make_request


@pytest.fixture
def engine() -> Iterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine(make_engine(num_blocks=256, step_s=0.002)[0])
    yield engine
    engine.shutdown()


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.002)


async def collect(engine: AsyncLLMEngine, prompt: list[int], params: SamplingParams) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, params):
        tokens = output.outputs[0].token_ids
    return tokens


def test_concurrent_streams_get_their_own_tokens(engine: AsyncLLMEngine) -> None:
    engine.start()
    params = SamplingParams(max_tokens=12, ignore_eos=True)

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(collect(engine, [index] * 5, params) for index in range(24)))

    assert asyncio.run(run()) == [expected_tokens([index] * 5, params) for index in range(24)]
    assert engine.stats().num_free_blocks == 256


def test_on_step_gets_each_steps_outputs_in_one_call(engine: AsyncLLMEngine) -> None:
    calls: list[list[SequenceOutput]] = []
    threads: set[str] = set()

    def on_step(outputs: list[SequenceOutput]) -> None:
        calls.append(outputs)
        threads.add(threading.current_thread().name)

    engine.start(on_step)
    for name in ("a", "b"):
        engine.add_request(make_request(name, [1, 2, 3], max_tokens=20))
    wait_for(lambda: {output.request_id for call in calls for output in call if output.request_finished} == {"a", "b"})
    assert any(len(call) == 2 for call in calls)
    assert threads == {"quire-engine"}


def test_closing_a_stream_frees_its_blocks(engine: AsyncLLMEngine) -> None:
    engine.start()

    async def run() -> None:
        stream = engine.generate([1] * 50, SamplingParams(max_tokens=900, ignore_eos=True))
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    wait_for(lambda: engine.stats().num_free_blocks == 256, timeout_s=1.0)


def test_abort_from_another_thread_ends_the_stream(engine: AsyncLLMEngine) -> None:
    engine.start()

    async def run() -> str | None:
        reason = None
        async for output in engine.generate([1], SamplingParams(max_tokens=900, ignore_eos=True), request_id="a"):
            reason = output.outputs[0].finish_reason
            if len(output.outputs[0].token_ids) > 2:
                engine.abort("a")
        return reason

    assert asyncio.run(run()) == "abort"


def test_a_stream_with_an_id_in_use_does_not_end_the_one_that_has_it(engine: AsyncLLMEngine) -> None:
    engine.start()
    params = SamplingParams(max_tokens=40, ignore_eos=True)

    async def run() -> list[int]:
        first = engine.generate([1, 2], params, request_id="a")
        await anext(first)
        with pytest.raises(RequestError, match="in use"):
            await anext(engine.generate([3], params, request_id="a"))
        outputs = [output async for output in first]
        return outputs[-1].outputs[0].token_ids

    assert asyncio.run(run()) == expected_tokens([1, 2], params)


def test_bad_requests_are_refused_at_once_and_harm_nobody(engine: AsyncLLMEngine) -> None:
    engine.start()
    with pytest.raises(PromptTooLongError):
        engine.add_request(make_request("long", [1] * 5000))
    engine.add_request(make_request("a", [1], max_tokens=100))
    with pytest.raises(RequestError, match="in use"):
        engine.add_request(make_request("a", [1]))
    engine.abort("unknown")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert asyncio.run(collect(engine, [9], params)) == expected_tokens([9], params)
    wait_for(lambda: engine.stats().num_running == 0)
    engine.add_request(make_request("a", [1], max_tokens=1))  # a finished request's id is free again


def test_a_failing_device_ends_every_request_and_says_so() -> None:
    class Failing(CheckingExecutor):
        def execute(self, output: SchedulerOutput) -> SamplerOutput:
            if self.num_computed_tokens > 40:
                raise RuntimeError("the device is gone")
            return super().execute(output)

    llm_engine, _executor = make_engine(num_blocks=64)
    llm_engine._executor = Failing(llm_engine.cache_config, llm_engine.config)
    engine = AsyncLLMEngine(llm_engine)
    engine.start()
    engine.check_health()

    async def run() -> None:
        await collect(engine, [1] * 20, SamplingParams(max_tokens=100, ignore_eos=True))

    with pytest.raises(EngineDeadError, match="failed while this request ran"):
        asyncio.run(run())
    with pytest.raises(EngineDeadError, match="the device is gone"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        engine.add_request(make_request("late", [1]))
    engine.shutdown()


def test_work_without_a_completed_step_is_unhealthy_and_idleness_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    device_works = threading.Event()

    class Hanging(CheckingExecutor):
        def execute(self, output: SchedulerOutput) -> SamplerOutput:
            device_works.wait()
            return super().execute(output)

    monkeypatch.setattr("engine.async_engine.HANG_S", 0.05)
    llm_engine, _executor = make_engine()
    llm_engine._executor = Hanging(llm_engine.cache_config, llm_engine.config)
    engine = AsyncLLMEngine(llm_engine)
    engine.start()
    engine.abort("unknown")
    time.sleep(0.1)
    engine.check_health()
    outputs: list[SequenceOutput] = []
    engine._on_step = outputs.extend
    engine.add_request(make_request("a", [1], max_tokens=2))
    time.sleep(0.1)
    with pytest.raises(EngineDeadError, match="completed no step"):
        engine.check_health()
    device_works.set()
    wait_for(lambda: any(output.request_finished for output in outputs))
    wait_for(lambda: engine._step_due_since is None)
    time.sleep(0.1)
    engine.check_health()
    engine.shutdown()


def test_shutdown_aborts_what_is_left_and_ends_the_thread(engine: AsyncLLMEngine) -> None:
    outputs: list[SequenceOutput] = []
    engine.start(outputs.extend)
    engine.add_request(make_request("a", [1], max_tokens=900))
    wait_for(lambda: outputs)
    engine.shutdown()
    assert outputs[-1].finish_reason == "abort"
    assert outputs[-1].request_finished
    assert "quire-engine" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(EngineDeadError):
        engine.check_health()


def test_warm_up_leaves_nothing_behind(engine: AsyncLLMEngine) -> None:
    engine.warm_up()
    assert engine.stats().num_free_blocks == 256
    engine.start()
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    assert asyncio.run(collect(engine, [0] * 32, params)) == expected_tokens([0] * 32, params)
