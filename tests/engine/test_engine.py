from __future__ import annotations

import pytest

from engine.errors import ConfigError, PromptTooLongError, RequestError
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams
from tests.engine.doubles import EOS, VOCAB_SIZE, expected_beams, expected_tokens, make_engine, make_request, run_to_end


def test_one_request_runs_to_its_length() -> None:
    engine, _ = make_engine()
    request = make_request("a", [1, 2, 3], max_tokens=10)
    engine.add_request(request)
    assert run_to_end(engine) == {("a", 0): expected_tokens([1, 2, 3], request.sampling_params)}


def test_a_step_without_work_does_nothing() -> None:
    engine, executor = make_engine()
    assert engine.step() == []
    assert executor.num_computed_tokens == 0


def test_decodes_and_prompt_chunks_share_a_step() -> None:
    engine, executor = make_engine(max_num_batched_tokens=8)
    engine.add_request(make_request("short", [1, 2], max_tokens=20))
    engine.step()
    engine.add_request(make_request("long", list(range(30)), max_tokens=4))
    first_tokens = [output.request_id for _ in range(4) for output in engine.step()]
    assert first_tokens == ["short"] * 4, "the decode goes on while the prompt is computed in chunks of 7"
    assert executor.largest_batch == 2
    tokens = run_to_end(engine)
    assert tokens["long", 0] == expected_tokens(list(range(30)), SamplingParams(max_tokens=4, ignore_eos=True))


def test_eos_and_stop_tokens_end_a_sequence() -> None:
    prompt = next(
        [n] for n in range(2000) if EOS in expected_tokens([n], SamplingParams(max_tokens=400))[3:] and n != 7
    )
    expected = expected_tokens(prompt, SamplingParams(max_tokens=400))
    engine, _ = make_engine(num_blocks=256)
    engine.add_request(make_request("eos", prompt, max_tokens=400, ignore_eos=False))
    engine.add_request(make_request("stop", prompt, max_tokens=400, stop_token_ids=(expected[2],)))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    eos = [output for output in outputs if output.request_id == "eos"]
    assert [token for output in eos for token in output.token_ids] == expected
    assert (eos[-1].finish_reason, eos[-1].stop_token_id, eos[-1].request_finished) == ("stop", EOS, True)
    stop = [output for output in outputs if output.request_id == "stop"]
    assert len(stop) == 3
    assert (stop[-1].finish_reason, stop[-1].stop_token_id) == ("stop", expected[2])


def test_a_sequence_ends_at_max_model_len() -> None:
    engine, _ = make_engine(max_model_len=20)
    engine.add_request(make_request("a", [1] * 12, max_tokens=None))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert len(outputs) == 8
    assert outputs[-1].finish_reason == "length"


def test_equal_prompts_share_cached_blocks() -> None:
    engine, executor = make_engine()
    prompt = list(range(33))
    engine.add_request(make_request("a", prompt, max_tokens=2))
    run_to_end(engine)
    before = executor.num_computed_tokens
    engine.add_request(make_request("b", prompt, max_tokens=2))
    first = engine.step()[0]
    assert first.num_cached_tokens == 32
    assert executor.num_computed_tokens - before == 1
    assert engine.stats().num_cached_tokens == 32


def test_a_tenant_never_hits_anothers_blocks() -> None:
    engine, executor = make_engine()
    params = SamplingParams(max_tokens=1)
    for salt, computed in (("a", 33), ("b", 33), ("a", 1)):
        before = executor.num_computed_tokens
        engine.add_request(EngineRequest(salt, list(range(33)), params, cache_salt=salt))
        run_to_end(engine)
        assert executor.num_computed_tokens - before == computed


@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [3, 16, 512])
def test_parallel_samples_share_the_prompt_and_survive_preemption(caching: bool, budget: int, preemption: str) -> None:
    engine, _ = make_engine(
        num_blocks=14,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        preemption=preemption,
        num_swap_blocks=32,
    )
    prompts = {f"r{i}": [i] * (9 + i) for i in range(4)}
    params = SamplingParams(n=3, max_tokens=12, ignore_eos=True)
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, params))
    tokens = run_to_end(engine)
    assert tokens == {
        (request_id, index): expected_tokens(prompt, params, index)
        for request_id, prompt in prompts.items()
        for index in range(3)
    }
    if budget > 3:  # a budget of 3 never runs enough at once to fill the pool
        assert engine.stats().num_preemptions > 0, "the pool was meant to be too small"


@pytest.mark.parametrize("preemption", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"length_penalty": 0.0}, {"length_penalty": 2.0, "early_stopping": "never"}, {"early_stopping": True}],
)
def test_beam_search_equals_brute_force_through_preemptions(
    options: dict[str, object], width: int, preemption: str
) -> None:
    engine, _ = make_engine(num_blocks=20, max_num_batched_tokens=12, preemption=preemption, num_swap_blocks=40)
    params = SamplingParams(n=width, max_tokens=12, temperature=0.0, use_beam_search=True, **options)  # type: ignore[arg-type]
    prompts = {f"r{i}": [i] * (7 + i) for i in range(6)}
    for request_id, prompt in prompts.items():
        engine.add_request(EngineRequest(request_id, prompt, params))
    tokens = run_to_end(engine)
    for request_id, prompt in prompts.items():
        assert [tokens[request_id, index] for index in range(width)] == expected_beams(prompt, params)
    if width == 4:
        stats = engine.stats()
        assert stats.num_preemptions > 0, "the pool was meant to be too small"
        if preemption != "auto":
            assert (stats.num_swaps > 0) == (preemption == "swap")


def test_fewer_beams_than_the_width_can_be_returned() -> None:
    engine, _ = make_engine()
    params = SamplingParams(n=2, best_of=5, max_tokens=9, temperature=0.0, use_beam_search=True)
    engine.add_request(EngineRequest("a", [1, 2, 3], params))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert [output.token_ids for output in outputs] == expected_beams([1, 2, 3], params)
    assert [output.request_finished for output in outputs] == [False, True]
    scores = [output.cumulative_logprob for output in outputs]
    assert all(score is not None and score < 0 for score in scores)


def test_best_of_returns_the_most_likely_samples_at_the_end() -> None:
    engine, _ = make_engine()
    params = SamplingParams(n=2, best_of=6, max_tokens=5, ignore_eos=True)
    engine.add_request(EngineRequest("a", [1, 2, 3], params))
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    samples = [expected_tokens([1, 2, 3], params, index) for index in range(6)]
    best = sorted(samples, key=sum)[:2]  # the device's log-probabilities fall with the token id
    assert [output.token_ids for output in outputs] == best


def test_an_aborted_search_ends_with_the_n_that_was_asked_for() -> None:
    engine, _ = make_engine()
    params = SamplingParams(n=2, best_of=4, max_tokens=50, temperature=0.0, use_beam_search=True, ignore_eos=True)
    engine.add_request(EngineRequest("a", [1, 2, 3], params))
    for _ in range(5):
        assert engine.step() == []
    outputs = engine.abort("a")
    assert [(output.index, output.finish_reason) for output in outputs] == [(0, "abort"), (1, "abort")]
    engine.check_invariants()


def test_a_full_swap_pool_falls_back_to_recomputation() -> None:
    engine, _ = make_engine(num_blocks=14, preemption="swap", num_swap_blocks=3, enable_prefix_caching=False)
    params = SamplingParams(n=2, max_tokens=14, ignore_eos=True)
    for index in range(5):
        engine.add_request(EngineRequest(str(index), [index] * 9, params))
    tokens = run_to_end(engine)
    assert tokens == {
        (str(index), sample): expected_tokens([index] * 9, params, sample) for index in range(5) for sample in range(2)
    }
    stats = engine.stats()
    assert stats.num_preemptions > stats.num_swaps


def test_named_prefixes_are_computed_once_and_never_leave() -> None:
    prefix = list(range(100, 118))  # four full blocks and two tokens
    engine, executor = make_engine(
        num_blocks=20, max_model_len=60, preemption="swap", num_swap_blocks=8, shared_prefixes={"system": prefix}
    )
    engine.pin_shared_prefixes()
    assert executor.num_computed_tokens == 16
    engine.reset_prefix_cache()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    for index in range(4):
        engine.add_request(EngineRequest(str(index), [*prefix, index], params))
    tokens = run_to_end(engine)
    assert tokens == {(str(index), 0): expected_tokens([*prefix, index], params) for index in range(4)}
    assert engine.stats().num_cached_tokens == 4 * 16
    assert engine.stats().num_swaps > 0, "the pool was meant to be too small"


@pytest.mark.parametrize(
    ("prefix", "message"),
    [([1] * 3, "from 4, one block"), ([1] * 40, "leave 10 KV blocks"), ([-1] * 8, "vocabulary"), ("text", "tokenizer")],
)
def test_a_prefix_that_cannot_be_pinned_is_a_config_error(prefix: str | list[int], message: str) -> None:
    engine, _ = make_engine(num_blocks=20, max_model_len=60, shared_prefixes={"system": prefix})
    with pytest.raises(ConfigError, match=rf"shared_prefixes\.system: .*{message}"):
        engine.pin_shared_prefixes()


def test_a_prompt_with_n_samples_is_computed_once() -> None:
    engine, executor = make_engine(enable_prefix_caching=False)
    engine.add_request(make_request("a", list(range(40)), n=8, max_tokens=2))
    run_to_end(engine)
    assert executor.num_computed_tokens == 40 + 8


def test_an_aborted_request_frees_its_blocks_at_once() -> None:
    engine, _ = make_engine(max_num_batched_tokens=8)
    engine.add_request(make_request("a", list(range(20)), n=2, max_tokens=50))
    engine.add_request(make_request("b", list(range(100, 120)), max_tokens=2))
    for _ in range(2):
        engine.step()
    outputs = engine.abort("a")
    assert [(output.index, output.finish_reason) for output in outputs] == [(0, "abort"), (1, "abort")]
    assert [output.request_finished for output in outputs] == [False, True]
    engine.check_invariants()
    assert engine.abort("a") == [], "a second time is no error"
    assert set(run_to_end(engine)) == {("b", 0)}


@pytest.mark.parametrize("steps", range(8))
def test_one_sample_of_a_group_can_end_at_any_time(steps: int) -> None:
    engine, _ = make_engine(max_num_batched_tokens=8)
    request = make_request("a", list(range(20)), n=3, max_tokens=6)
    engine.add_request(request)
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(steps):
        for output in engine.step():
            tokens[output.index] += output.token_ids
    engine.abort("a", index=0)
    for (_, index), rest in run_to_end(engine).items():
        tokens[index] += rest
    for index in (1, 2):
        assert tokens[index] == expected_tokens(list(range(20)), request.sampling_params, index)


def test_a_preempted_group_can_lose_its_trunk() -> None:
    engine, _ = make_engine(num_blocks=11, max_num_batched_tokens=8, enable_prefix_caching=False)
    first = make_request("first", list(range(16)), max_tokens=24)
    second = make_request("second", list(range(50, 60)), n=2, max_tokens=12)
    engine.add_request(first)
    engine.add_request(second)
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.stats().num_preemptions == 0:
        assert engine.has_unfinished_requests, "the pool was meant to be too small"
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    engine.abort("second", index=0)
    for key, rest in run_to_end(engine).items():
        tokens.setdefault(key, []).extend(rest)
    assert tokens["first", 0] == expected_tokens(list(range(16)), first.sampling_params)
    assert tokens["second", 1] == expected_tokens(list(range(50, 60)), second.sampling_params, 1)


def test_an_interrupted_request_goes_on_where_it_stood() -> None:
    params = SamplingParams(n=3, max_tokens=10, ignore_eos=True)
    prompt = list(range(9))
    whole = [expected_tokens(prompt, params, index) for index in range(3)]
    engine, _ = make_engine()
    resumed = (
        ResumedSequence(tuple(whole[0][:4])),
        ResumedSequence(tuple(whole[1]), finished=True),
        ResumedSequence(tuple(whole[2][:7])),
    )
    engine.add_request(EngineRequest("a", prompt, params, resumed=resumed))
    assert run_to_end(engine) == {("a", 0): whole[0][4:], ("a", 2): whole[2][7:]}


def test_a_resumed_sequence_that_is_a_prefix_of_its_sibling_still_draws() -> None:
    params = SamplingParams(n=2, max_tokens=6, ignore_eos=True)
    engine, _ = make_engine()
    resumed = (ResumedSequence((11, 12, 13)), ResumedSequence((11, 12)))
    engine.add_request(EngineRequest("a", [1, 2, 3], params, resumed=resumed))
    tokens = run_to_end(engine)
    assert (len(tokens["a", 0]), len(tokens["a", 1])) == (3, 4)


def test_what_can_never_fit_is_refused_at_once() -> None:
    engine, _ = make_engine(num_blocks=16, max_model_len=40)
    for request, error, param in (
        (make_request("a", [1] * 40), PromptTooLongError, "prompt"),
        (make_request("a", [1] * 30, max_tokens=11), PromptTooLongError, "max_tokens"),
        (make_request("a", [1] * 8, n=8, max_tokens=12), RequestError, "n"),
        (make_request("a", [1], n=17, max_tokens=1), RequestError, "n"),
        (make_request("a", [VOCAB_SIZE]), RequestError, "prompt"),
        (make_request("a", [1], stop_token_ids=(VOCAB_SIZE,)), RequestError, "stop_token_ids"),
        (make_request("a", [1], logit_bias={VOCAB_SIZE: 1.0}), RequestError, "logit_bias"),
    ):
        with pytest.raises(error) as caught:
            engine.add_request(request)
        assert caught.value.param == param
    engine.add_request(make_request("a", [1]))
    with pytest.raises(RequestError, match="in use"):
        engine.add_request(make_request("a", [1]))
    run_to_end(engine)


def test_a_pool_that_cannot_hold_max_model_len_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"max_model_len=100 does not fit .* 16 blocks"):
        make_engine(num_blocks=16, max_model_len=100)
    with pytest.raises(ConfigError, match="exceeds the checkpoint's 4096 positions"):
        make_engine(num_blocks=4096, max_model_len=5000)
    engine, _ = make_engine(num_blocks=16)
    assert engine.max_model_len == 64


def test_the_load_counts_prompt_tokens_that_are_left_and_not_cached() -> None:
    engine, _ = make_engine(max_num_batched_tokens=32, max_num_seqs=1)
    shared = list(range(64))
    engine.add_request(make_request("first", shared, max_tokens=40))
    assert engine.stats().num_waiting_tokens == 64
    engine.step()
    # It runs, and half its prompt is still to come.
    assert engine.stats().num_running == 1
    assert engine.stats().num_waiting_tokens == 32
    engine.step()
    assert engine.stats().num_waiting_tokens == 0
    # One that waits behind it, of whose prompt four blocks are cached.
    engine.add_request(make_request("second", [*shared, 1, 2, 3], max_tokens=4))
    assert engine.stats().num_waiting_tokens == 3
    engine.add_request(make_request("third", [9, *shared], max_tokens=4))
    assert engine.stats().num_waiting_tokens == 3 + 65
    engine.abort("first")
    engine.reset_prefix_cache()
    assert engine.stats().num_waiting_tokens == 67 + 65
    run_to_end(engine)
    assert engine.stats().num_waiting_tokens == 0


def test_outputs_say_how_long_their_request_waited() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request(make_request("first", [1, 2], max_tokens=3))
    engine.add_request(make_request("second", [3, 4], max_tokens=3))
    first = engine.step()[0]
    waited = [output.waited_s for _ in range(4) for output in engine.step() if output.request_id == "second"]
    assert len(set(waited)) == 1
    assert waited[0] > first.waited_s >= 0.0
