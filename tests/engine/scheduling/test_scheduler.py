from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import RequestError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from tests.engine.doubles import expected_beams, expected_tokens, make_engine, make_request, run_to_end


def test_first_come_first_served_and_nobody_overtakes() -> None:
    engine, _ = make_engine(num_blocks=16, max_model_len=64)
    engine.add_request(make_request("big", [1] * 40, max_tokens=8))
    engine.add_request(make_request("bigger", [2] * 50, max_tokens=8))
    engine.add_request(make_request("small", [3], max_tokens=1))
    finished = []
    while engine.has_unfinished_requests:
        finished += [output.request_id for output in engine.step() if output.request_finished]
    assert finished == ["big", "small", "bigger"] or finished == ["big", "bigger", "small"]
    assert finished[0] == "big"


def test_a_small_request_waits_behind_a_large_one_that_does_not_fit() -> None:
    engine, _ = make_engine(num_blocks=16, max_model_len=64)
    engine.add_request(make_request("running", [1] * 40, max_tokens=4))
    engine.add_request(make_request("large", [2] * 40, max_tokens=4))
    engine.add_request(make_request("small", [3], max_tokens=1))
    first_token: dict[str, int] = {}
    step = 0
    while engine.has_unfinished_requests:
        for output in engine.step():
            first_token.setdefault(output.request_id, step)
        step += 1
    assert first_token["running"] < first_token["large"] <= first_token["small"]


def test_the_newest_group_is_preempted_whole() -> None:
    engine, _ = make_engine(num_blocks=12, enable_prefix_caching=False)
    for name in ("old", "mid", "new"):
        engine.add_request(make_request(name, [ord(name[0])] * 14, n=1, max_tokens=20))
    order: list[str] = []
    while engine.has_unfinished_requests:
        order += [output.request_id for output in engine.step() if output.request_finished]
    assert order == ["old", "mid", "new"]
    assert engine.stats().num_preemptions > 0


def test_seats_are_counted_by_sequence() -> None:
    engine, executor = make_engine(num_blocks=256, max_num_seqs=4)
    for index in range(4):
        engine.add_request(make_request(str(index), [index, 1], n=3, max_tokens=3))
    run_to_end(engine)
    assert executor.largest_batch == 3


def test_a_full_pool_takes_one_request_after_another() -> None:
    engine, _ = make_engine(num_blocks=4, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    for index in range(5):
        engine.add_request(EngineRequest(str(index), [index] * 10, params))
    tokens = run_to_end(engine)
    assert tokens == {(str(index), 0): expected_tokens([index] * 10, params) for index in range(5)}


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, aborts and steps on a small pool over the checking device.

    The device itself checks budgets, seats and that every sequence reads back its own tokens; here: every request
    that is not aborted ends with exactly the tokens that it would have alone, no block leaks, and the order is fair.
    """

    @initialize(
        num_blocks=st.integers(6, 20),
        block_size=st.sampled_from([1, 2, 4, 16]),
        budget=st.integers(1, 24),
        seats=st.integers(3, 8),
        caching=st.booleans(),
        preemption=st.sampled_from(["swap", "recompute", "auto"]),
        num_swap_blocks=st.sampled_from([1, 4, 32]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        budget: int,
        seats: int,
        caching: bool,
        preemption: str,
        num_swap_blocks: int,
    ) -> None:
        self.block_size = block_size
        self.pool_tokens = num_blocks * block_size
        self.engine, self.device = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_batched_tokens=budget,
            max_num_seqs=seats,
            **self.options(caching, preemption, num_swap_blocks),
        )
        self.budget = budget
        self.requests: dict[str, EngineRequest] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.first_token_order: list[str] = []
        self.ended: set[str] = set()
        self.searches: set[str] = set()
        self.count = 0

    def options(self, caching: bool, preemption: str, num_swap_blocks: int) -> dict[str, Any]:
        """Engine options beside those that `start` draws."""
        return {"enable_prefix_caching": caching, "preemption": preemption, "num_swap_blocks": num_swap_blocks}

    @rule(
        length=st.integers(1, 24),
        seed=st.integers(0, 2),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        ignore_eos=st.booleans(),
        beams=st.sampled_from([False, False, True]),
    )
    def arrive(self, length: int, seed: int, max_tokens: int, n: int, ignore_eos: bool, beams: bool) -> None:
        request_id = f"r{self.count}"
        prompt = [seed] * length
        temperature = 0.0 if beams else 1.0
        request = EngineRequest(
            request_id,
            prompt,
            SamplingParams(
                n=n, max_tokens=max_tokens, ignore_eos=ignore_eos, use_beam_search=beams, temperature=temperature
            ),
        )
        try:
            self.engine.add_request(request)
        except RequestError:
            self.must_be_too_large(request)
            return
        self.count += 1
        self.requests[request_id] = request
        if beams:
            self.searches.add(request_id)

    def must_be_too_large(self, request: EngineRequest) -> None:
        """Only what the whole pool could not hold may be refused."""
        params, num_prompt = request.sampling_params, len(request.prompt_token_ids)
        assert params.max_tokens is not None
        num_shared = num_prompt // self.block_size
        num_blocks = -(-(num_prompt + params.max_tokens) // self.block_size)
        worst = num_shared + params.n * (num_blocks - num_shared)
        too_wide = params.use_beam_search and params.width > self.budget
        assert too_wide or num_prompt >= self.pool_tokens or worst * self.block_size > self.pool_tokens

    @precondition(lambda self: bool(getattr(self, "requests", None)))
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.abort(request_id, index=None if whole else 0)
        del self.requests[request_id]

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())

    def take(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.request_id not in self.first_token_order:
                self.first_token_order.append(output.request_id)
            self.tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            if output.request_finished:
                self.ended.add(output.request_id)

    @invariant()
    def no_block_leaks(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_invariants()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_unfinished_requests:
                break
            outputs = self.engine.step()
            self.take(outputs)
            self.engine.check_invariants()
        assert not self.engine.has_unfinished_requests, "an admitted request never ends"
        for request_id, request in self.requests.items():
            assert request_id in self.ended
            params, prompt = request.sampling_params, list(request.prompt_token_ids)
            if params.use_beam_search:
                expected = expected_beams(prompt, params)
            else:
                expected = [expected_tokens(prompt, params, index) for index in range(params.n)]
            assert [self.tokens[request_id, index] for index in range(params.n)] == expected
        # Fair: first tokens come in order of arrival. A beam search shows its tokens only at its end.
        streamed = [name for name in self.first_token_order if name not in self.searches]
        arrivals = [int(request_id[1:]) for request_id in streamed]
        assert arrivals == sorted(arrivals)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
