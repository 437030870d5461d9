"""The engine over a simulated device: time passes as the model says, tokens survive whatever the scheduler does."""

from __future__ import annotations

import dataclasses
import time

import pytest

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.hardware import find_hardware
from engine.execution.simulated import RealClock, SimulatedExecutor, VirtualClock, build_simulated_engine
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import open_checkpoint
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

OPT_13B = open_checkpoint("dummy:opt-13b").model_config()
A100 = find_hardware("a100-40gb")


def make_engine(**options: object) -> tuple[LLMEngine, SimulatedExecutor]:
    fixed = {"max_model_len": 2048, "num_blocks": 981, "enable_prefix_caching": False}
    return build_simulated_engine(OPT_13B, A100, EngineConfig.from_dict({**fixed, **options}), VirtualClock())


def run(engine: LLMEngine, prompts: dict[str, list[int]], **params: object) -> dict[tuple[str, int], list[int]]:
    sampling = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, "seed": 3, **params})  # type: ignore[arg-type]
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, sampling))
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.check_invariants()
    return tokens


def test_the_clock_moves_by_the_price_of_each_step() -> None:
    engine, executor = make_engine()
    engine.add_request(EngineRequest("a", [1] * 100, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)))
    prices = StepTimeModel(OPT_13B, A100, 16)
    prompt, decode = StepWork(1, 100, 1, 100, 5050), StepWork(1, 1, 1, 101, 101)
    engine.step()
    assert executor.last_work == prompt
    assert executor.clock.now() == pytest.approx(prices.seconds(prompt))
    engine.step()
    assert executor.last_work == decode
    assert executor.clock.now() == executor.busy_s == pytest.approx(prices.seconds(prompt) + prices.seconds(decode))


def test_an_empty_step_takes_no_time() -> None:
    engine, executor = make_engine()
    assert engine.step() == []
    assert executor.clock.now() == 0.0


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "n": 3},
        {"temperature": 0.0, "use_beam_search": True, "best_of": 3, "n": 2},
    ],
)
def test_tokens_do_not_depend_on_preemption_chunks_or_batch(params: dict[str, object], preemption: str) -> None:
    prompts = {str(index): [index + 1] * (20 + 7 * index) for index in range(8)}
    roomy, _ = make_engine()
    cramped, _ = make_engine(
        num_blocks=24, max_model_len=256, max_num_batched_tokens=64, preemption=preemption, num_swap_blocks=64
    )
    expected = run(roomy, prompts, **params)
    assert run(cramped, prompts, **params) == expected
    assert cramped.stats().num_preemptions > 0
    assert (cramped.stats().num_swaps > 0) == (preemption == "swap")
    alone: dict[tuple[str, int], list[int]] = {}
    for request_id, prompt in prompts.items():
        alone.update(run(make_engine()[0], {request_id: prompt}, **params))
    assert alone == expected


def test_a_real_clock_sleeps() -> None:
    clock = RealClock()
    begin, wall = clock.now(), time.perf_counter()
    clock.advance(0.05)
    assert clock.now() - begin >= 0.05
    assert time.perf_counter() - wall >= 0.05


def test_the_pool_is_what_the_memory_leaves() -> None:
    options = {"gpu_memory_utilization": 0.95, "max_model_len": 2048}
    engine, executor = build_simulated_engine(OPT_13B, A100, EngineConfig.from_dict(options), VirtualClock())
    left = 0.95 * 40e9 - executor.step_time.weight_bytes
    assert engine.cache_config.num_blocks == int(left // (16 * 819_200))


def test_weights_larger_than_memory_are_refused() -> None:
    small = dataclasses.replace(A100, memory_bytes=20e9)
    with pytest.raises(ConfigError, match=r"a100-40gb.*25\.7 GB of weights.*20 GB"):
        build_simulated_engine(OPT_13B, small, EngineConfig(), VirtualClock())


def test_swapping_takes_the_time_of_its_bytes() -> None:
    slow = dataclasses.replace(A100, host_bandwidth=1e9)
    options = {"num_blocks": 24, "max_model_len": 256, "preemption": "swap", "enable_prefix_caching": False}
    times = []
    for hardware in (A100, slow):
        engine, executor = build_simulated_engine(OPT_13B, hardware, EngineConfig.from_dict(options), VirtualClock())
        run(engine, {str(index): [index + 1] * 40 for index in range(6)})
        assert engine.stats().num_swaps > 0
        times.append(executor.clock.now())
        assert executor.swap_cost().out_bytes_per_s < hardware.host_bandwidth
    assert times[1] > times[0]


def test_a_shared_prefix_is_computed_before_the_first_request() -> None:
    engine, executor = make_engine(enable_prefix_caching=True, shared_prefixes={"task": list(range(64))})
    assert executor.clock.now() > 0.0
    engine.add_request(EngineRequest("a", [*range(64), 5, 6], SamplingParams(max_tokens=1)))
    engine.step()
    assert executor.last_work.num_tokens == 2


def test_scheduling_ahead_hides_the_shorter_of_host_and_device() -> None:
    model, work = StepTimeModel(OPT_13B, A100, 16), StepWork(1, 1, 1, 101, 101)
    host_s = model.host_seconds(work)
    device_s = model.seconds(work) - host_s
    tokens, seconds = {}, {}
    for ahead in (False, True):
        engine, executor = make_engine(async_scheduling=ahead)
        tokens[ahead] = run(engine, {"a": [1] * 100}, max_tokens=50)
        seconds[ahead] = executor.clock.now()
    assert tokens[False] == tokens[True]
    # All steps but one pass while the host prepares the next, or the other way round.
    assert seconds[False] - seconds[True] == pytest.approx(49 * min(host_s, device_s), rel=0.05)
