from __future__ import annotations

import math

import numpy as np
import pytest

from engine.decoding.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduling import SampledToken, SampleRequest

RNG = np.random.default_rng(0)
EOS = 3


def request(
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    seed: int = 0,
    index: int = 0,
) -> SampleRequest:
    tokens = np.array([*prompt, *output], dtype=np.int32)
    return SampleRequest(0, "r", params, seed, index, len(tokens), len(prompt), tokens, 0.0)


def sample(logits: np.ndarray, *requests: SampleRequest) -> tuple[SampledToken, ...]:
    rows = np.asarray(logits, dtype=np.float32)
    return Sampler((EOS,)).sample(rows.reshape(-1, rows.shape[-1]), requests, [0] * len(requests)).tokens


def draw_many(logits: np.ndarray, params: SamplingParams, count: int = 4000) -> np.ndarray:
    """Frequencies of each token over `count` seeds."""
    tokens = [item.token_id for item in sample(logits, *(request(params, seed=seed) for seed in range(count)))]
    return np.bincount(tokens, minlength=len(logits)) / count


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def test_greedy_is_argmax() -> None:
    logits = RNG.normal(size=(5, 100)).astype(np.float32)
    requests = [request(SamplingParams(temperature=0.0)) for _ in range(5)]
    drawn = Sampler(()).sample(logits, requests, range(5))
    assert [item.token_id for item in drawn.tokens] == logits.argmax(axis=1).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = RNG.normal(size=12) * 2
    for temperature in (0.5, 1.0, 1.7):
        frequencies = draw_many(logits, SamplingParams(temperature=temperature))
        np.testing.assert_allclose(frequencies, softmax(logits / temperature), atol=0.035)


def reference_support(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """Tokens that may be drawn, by sorting everything."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.top_k > 0:
        order = order[: params.top_k]
    probabilities = softmax(logits[order].astype(np.float64) / params.temperature)
    if params.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        order = [token for token, mass in zip(order, before, strict=True) if mass < params.top_p]
    probabilities = softmax(logits[order].astype(np.float64) / params.temperature)
    return {token for token, p in zip(order, probabilities, strict=True) if p >= params.min_p * probabilities.max()}


@pytest.mark.parametrize("vocab_size", [50, 5000])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.7),
        SamplingParams(top_p=0.99999),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=3000, top_p=0.95),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.1, temperature=1.3),
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-9),
    ],
)
def test_only_what_the_filters_leave_is_drawn(params: SamplingParams, vocab_size: int) -> None:
    logits = RNG.normal(size=vocab_size).astype(np.float32) * 1.5
    frequencies = draw_many(logits, params, count=1500)
    support = reference_support(logits, params)
    assert set(np.flatnonzero(frequencies).tolist()) <= support
    if len(support) <= 20:
        assert set(np.flatnonzero(frequencies > 0).tolist()) >= {int(np.argmax(logits))}
        expected = np.zeros(vocab_size)
        members = sorted(support)
        expected[members] = softmax(logits[members] / params.temperature)
        np.testing.assert_allclose(frequencies, expected, atol=0.06)


def test_equal_logits_fall_to_the_lower_id() -> None:
    logits = np.zeros(10)
    assert set(np.flatnonzero(draw_many(logits, SamplingParams(top_k=3), 200))) == {0, 1, 2}
    assert sample(logits, request(SamplingParams(temperature=0.0)))[0].token_id == 0


def test_a_draw_depends_on_seed_index_and_position_alone() -> None:
    logits = RNG.normal(size=500)
    params = SamplingParams()
    alone = sample(logits, request(params, seed=5))[0].token_id
    crowd = sample(logits, *(request(params, seed=seed) for seed in range(20)))
    assert crowd[5].token_id == alone
    by_index = {sample(logits, request(params, seed=5, index=index))[0].token_id for index in range(20)}
    assert len(by_index) > 10


def test_repetition_presence_and_frequency_penalties() -> None:
    logits = np.array([1.0, -1.0, 2.0, 2.0, 0.5])
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, request(params, prompt=(2,)))[0].token_id == 3, "the prompt counts for repetition"
    params = SamplingParams(temperature=0.0, presence_penalty=1.6)
    assert sample(logits, request(params, prompt=(2,), output=(2,)))[0].token_id == 3
    assert sample(logits, request(params, prompt=(2, 3)))[0].token_id == 2, "the prompt does not count for presence"
    params = SamplingParams(temperature=0.0, frequency_penalty=0.6)
    assert sample(logits, request(params, output=(2, 2, 3)))[0].token_id == 3
    assert sample(logits, request(params, output=(2, 2, 3, 3)))[0].token_id == 0


def test_bias_and_min_tokens() -> None:
    logits = np.array([1.0, 0.0, 0.5, 9.0, 0.0])
    assert sample(logits, request(SamplingParams(temperature=0.0, logit_bias={3: -20.0})))[0].token_id == 0
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    assert sample(logits, request(params))[0].token_id == 2, "neither end-of-sequence nor stop tokens yet"
    assert sample(logits, request(params, output=(2, 2)))[0].token_id == EOS


def test_logprobs_are_the_models_own() -> None:
    logits = RNG.normal(size=50).astype(np.float32)
    expected = np.log(softmax(logits.astype(np.float64)))
    params = SamplingParams(temperature=0.3, logprobs=4, logit_bias={7: 50.0})
    drawn = sample(logits, request(params))[0]
    assert drawn.token_id == 7
    assert drawn.logprob == pytest.approx(expected[7], abs=1e-6)
    assert [token for token, _ in drawn.top] == np.argsort(-expected)[:4].tolist()
    np.testing.assert_allclose([value for _, value in drawn.top], np.sort(expected)[::-1][:4], atol=1e-6)
    none = sample(logits, request(SamplingParams(logprobs=0)))[0]
    assert none.top == ()
    assert none.logprob < 0
    assert math.isnan(sample(logits, request(SamplingParams()))[0].logprob)


def test_inputs_are_not_changed() -> None:
    logits = RNG.normal(size=(1, 50)).astype(np.float32)
    before = logits.copy()
    params = SamplingParams(repetition_penalty=1.5, logit_bias={1: 3.0}, top_k=5, min_tokens=3)
    Sampler((EOS,)).sample(logits, [request(params)], [0])
    np.testing.assert_array_equal(logits, before)
