"""Asynchronous scheduling gives the tokens that the synchronous engine gives, whatever happens to a step in flight."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams
from tests.engine.doubles import (
    EOS,
    MODEL,
    BusyDevice,
    CheckingDevice,
    CheckingExecutor,
    expected_beams,
    expected_tokens,
    make_async_engine,
    make_engine,
    make_request,
    run_to_end,
)

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "samples": {"n": 3},
    "best_of": {"n": 2, "best_of": 4},
    "beams": {"n": 3, "temperature": 0.0, "use_beam_search": True},
    "penalties": {"repetition_penalty": 1.2},
    "biased": {"logit_bias": {3: 1.0}, "n": 2},
    "min_tokens": {"min_tokens": 5},
}


def expected(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """The sequences that a request gives back, computed without an engine."""
    if params.use_beam_search:
        return expected_beams(prompt, params)
    samples = [expected_tokens(prompt, params, index) for index in range(params.width)]
    # The checking device's log-probabilities fall with the token id.
    return sorted(samples, key=lambda tokens: sum(tokens) / len(tokens))[: params.n] if params.ranks_at_end else samples


@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("budget", [5, 16, 512])
@pytest.mark.parametrize("caching", [True, False])
def test_every_decoding_method_through_preemptions(caching: bool, budget: int, preemption: str) -> None:
    engine, device = make_async_engine(
        num_blocks=20,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        preemption=preemption,
        num_swap_blocks=64,
    )
    requests = [
        make_request(f"{name} {k}", [k * 10 + i] * (5 + 3 * k), max_tokens=12, ignore_eos=False, **params)
        for k in range(2)
        for i, (name, params) in enumerate(METHODS.items())
    ]
    for request in requests:
        engine.add_request(request)
    tokens = run_to_end(engine)
    for request in requests:
        for index, sequence in enumerate(expected(list(request.prompt_token_ids), request.sampling_params)):
            assert tokens[request.request_id, index] == sequence, request.request_id
    stats = engine.stats()
    assert stats.num_preemptions > 0, "the pool was meant to be too small"
    assert device.num_ahead > stats.num_steps // 2


def test_a_lone_request_is_computed_ahead_to_its_last_token() -> None:
    engine, device = make_async_engine()
    engine.add_request(make_request("a", [1, 2, 3], max_tokens=10))
    assert run_to_end(engine) == {("a", 0): expected_tokens([1, 2, 3], SamplingParams(max_tokens=10, ignore_eos=True))}
    assert engine.stats().num_steps == 10, "no step was spent on a token past the last"
    assert device.num_ahead == 9
    assert device.num_computed_tokens == 12


@pytest.mark.parametrize(("name", "num_ahead"), [("beams", 0), ("penalties", 5), ("biased", 5), ("min_tokens", 5)])
def test_only_beams_wait_for_the_host(name: str, num_ahead: int) -> None:
    """Penalties of a token in flight are the device's affair."""
    engine, device = make_async_engine()
    engine.add_request(make_request("a", [1, 2, 3], max_tokens=6, **METHODS[name]))
    run_to_end(engine)
    assert device.num_ahead == num_ahead


def test_the_token_after_the_end_is_discarded_and_its_blocks_come_back() -> None:
    prompt = next([n] for n in range(2000) if 3 < len(expected_tokens([n], SamplingParams(max_tokens=20))) < 15)
    whole = expected_tokens(prompt, SamplingParams(max_tokens=20))
    assert whole[-1] == EOS
    engine, device = make_async_engine(num_blocks=12)
    engine.add_request(make_request("a", prompt, max_tokens=20, ignore_eos=False))
    outputs: list[SequenceOutput] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += engine.step()
    assert [token for output in outputs for token in output.token_ids] == whole
    assert engine.has_unfinished_requests, "the step that goes past the end is in flight"
    assert engine.stats().num_free_blocks < 12
    assert engine.step() == []
    assert not engine.has_unfinished_requests
    assert engine.stats().num_free_blocks == 12
    engine.check_invariants()
    assert device.num_computed_tokens == len(prompt) + len(whole)


def test_an_abort_keeps_the_blocks_that_the_step_in_flight_uses() -> None:
    engine, _ = make_async_engine(num_blocks=8)
    engine.add_request(make_request("a", list(range(20)), max_tokens=12))
    engine.step()
    held = 8 - engine.stats().num_free_blocks
    engine.abort("a")
    assert 8 - engine.stats().num_free_blocks == held
    second = make_request("b", list(range(50, 74)), max_tokens=8)  # needs the whole pool
    engine.add_request(second)
    assert run_to_end(engine) == {("b", 0): expected_tokens(list(range(50, 74)), second.sampling_params)}


def test_a_request_id_can_be_used_again_while_its_old_step_runs() -> None:
    engine, _ = make_async_engine()
    engine.add_request(make_request("other", [9], max_tokens=30))  # so that something is always in flight
    engine.add_request(make_request("a", [1, 2, 3], max_tokens=6, **METHODS["beams"]))
    engine.step()
    assert engine._live["a"].num_steps_in_flight == 0
    engine.step()
    assert engine._live["a"].num_steps_in_flight == 1
    engine.abort("a")
    request = make_request("a", [4, 5, 6], max_tokens=6, **METHODS["beams"])
    engine.add_request(request)
    tokens = run_to_end(engine)
    assert [tokens["a", index] for index in range(3)] == expected_beams([4, 5, 6], request.sampling_params)


def test_no_block_is_cached_for_a_token_in_flight() -> None:
    engine, _ = make_async_engine()
    engine.add_request(make_request("a", list(range(15)), max_tokens=30))
    for _ in range(20):
        engine.step()
        (seq,) = engine._live[engine._live.request_ids[0]].live_seqs
        assert seq.num_placeholders == 1
        known = seq.num_known_tokens // 4
        assert len(seq.block_hashes) <= known
        assert engine._kv_cache.block_table(seq).num_hashed_blocks >= known - 1


def test_the_prefix_cache_holds_what_it_would_without_pipelining() -> None:
    hits = []
    for make in (make_engine, make_async_engine):
        engine, _ = make(num_blocks=64)
        for _ in range(2):
            engine.add_request(make_request("a", list(range(15)), max_tokens=14))
            tokens = run_to_end(engine)["a", 0]
        engine.add_request(make_request("b", [*range(15), *tokens], max_tokens=2))
        run_to_end(engine)
        hits.append(engine.stats().num_cached_tokens)
    assert hits[0] == hits[1] > 28


def test_a_resumed_group_goes_on_ahead() -> None:
    params = SamplingParams(n=2, max_tokens=10, ignore_eos=True)
    whole = [expected_tokens([1, 2, 3], params, index) for index in range(2)]
    engine, device = make_async_engine(max_num_batched_tokens=4)
    resumed = (ResumedSequence(tuple(whole[0][:7])), ResumedSequence(tuple(whole[1][:2])))
    engine.add_request(EngineRequest("a", [1, 2, 3], params, resumed=resumed))
    assert run_to_end(engine) == {("a", 0): whole[0][7:], ("a", 1): whole[1][2:]}
    assert device.num_ahead > 5


def test_the_host_works_while_the_device_does() -> None:
    """Ten steps of 30 ms on the device and 20 ms on the host: one after the other 500 ms, overlapped 320."""
    step_s, host_s, num_steps = 0.03, 0.02, 10
    seconds = {}
    for ahead in (False, True):
        engine, _ = make_async_engine(BusyDevice, step_s=step_s)
        if not ahead:
            engine, _ = make_engine(step_s=step_s)
        schedule = engine._scheduler.schedule

        def slow_schedule(schedule: Any = schedule) -> Any:
            time.sleep(host_s)
            return schedule()

        engine._scheduler.schedule = slow_schedule  # type: ignore[method-assign]
        request = make_request("a", [1, 2, 3], max_tokens=num_steps)
        engine.add_request(request)
        began = time.perf_counter()
        assert run_to_end(engine)["a", 0] == expected_tokens([1, 2, 3], request.sampling_params)
        seconds[ahead] = time.perf_counter() - began
    assert seconds[False] > num_steps * (step_s + host_s)
    assert seconds[True] < seconds[False] - 0.6 * num_steps * host_s


def test_a_device_that_fails_fails_the_step_that_waits_for_it() -> None:
    class Failing(CheckingDevice):
        def execute(self, _output: Any) -> Any:
            raise RuntimeError("the device fell off the bus")

    engine, _ = make_async_engine(Failing)
    engine.add_request(make_request("a", [1, 2, 3]))
    with pytest.raises(RuntimeError, match="fell off the bus"):
        engine.step()


@pytest.mark.parametrize(("wanted", "device", "ahead"), [
    ("auto", CheckingDevice, True), (True, CheckingDevice, True), (False, CheckingDevice, False),
    ("auto", CheckingExecutor, False), (False, CheckingExecutor, False),
])  # fmt: skip
def test_auto_asks_the_executor(wanted: Any, device: type[CheckingExecutor], ahead: bool) -> None:
    config = EngineConfig(num_blocks=16, async_scheduling=wanted)
    cache = CacheConfig.of(config, 16)
    assert LLMEngine(device(cache, config), MODEL, config, cache).schedules_ahead is ahead


def test_an_executor_that_cannot_is_a_config_error() -> None:
    config = EngineConfig(num_blocks=16, async_scheduling=True)
    cache = CacheConfig.of(config, 16)
    with pytest.raises(ConfigError, match="async_scheduling=True needs a device"):
        LLMEngine(CheckingExecutor(cache, config), MODEL, config, cache)


class Pipelined(RuleBasedStateMachine):
    """Requests of all methods come, go on and are aborted, in a pool too small for them."""

    @initialize(
        preemption=st.sampled_from(["swap", "recompute", "auto"]),
        budget=st.integers(4, 40),
        num_blocks=st.integers(12, 30),
        num_swap_blocks=st.integers(1, 40),
        caching=st.booleans(),
    )
    def start(self, preemption: str, budget: int, num_blocks: int, num_swap_blocks: int, caching: bool) -> None:
        self.engine, self.device = make_async_engine(
            num_blocks=num_blocks,
            num_swap_blocks=num_swap_blocks,
            max_model_len=40,
            preemption=preemption,
            max_num_batched_tokens=budget,
            enable_prefix_caching=caching,
        )
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.num_requests = 0

    @rule(
        method=st.sampled_from(sorted(METHODS)),
        prompt=st.integers(0, 3),
        length=st.integers(1, 14),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
    )
    def add(self, method: str, prompt: int, length: int, max_tokens: int, ignore_eos: bool) -> None:
        params = dict(METHODS[method])
        params["min_tokens"] = min(params.get("min_tokens", 0), max_tokens)
        request = make_request(
            str(self.num_requests), [prompt] * length, max_tokens=max_tokens, ignore_eos=ignore_eos, **params
        )
        if request.sampling_params.width * -(-(length + max_tokens) // 4) > self.engine.cache_config.num_blocks:
            return  # refused: it could never run
        self.num_requests += 1
        self.engine.add_request(request)
        for index, tokens in enumerate(expected([prompt] * length, request.sampling_params)):
            self.expected[request.request_id, index] = tokens

    @rule()
    def step(self) -> None:
        for output in self.engine.step():
            self.tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)

    @precondition(lambda self: self.num_requests > 0)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = str(data.draw(st.integers(0, self.num_requests - 1)))
        index = data.draw(st.sampled_from([None, 0, 1]))
        for output in self.engine.abort(request_id, index):
            key = request_id, output.index
            assert self.expected.pop(key)[: len(self.tokens.get(key, []))] == self.tokens.get(key, [])
            self.tokens.pop(key, None)

    @invariant()
    def blocks_are_accounted_for(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for key, tokens in run_to_end(self.engine, max_steps=5000).items():
            self.tokens.setdefault(key, []).extend(tokens)
        assert self.tokens == self.expected
        assert self.engine.stats().num_free_blocks == self.engine.cache_config.num_blocks


Pipelined.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestPipelined = Pipelined.TestCase
