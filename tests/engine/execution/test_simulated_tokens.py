"""Made-up tokens: functions of the sequence, drawn from the distributions that they claim."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from engine.execution.simulated_tokens import SimulatedLanguage
from engine.sampling_params import SamplingParams
from engine.scheduling import SampledToken, SampleRequest

LANGUAGE = SimulatedLanguage(vocab_size=50, banned_early=(7,))


def request(tokens: list[int], index: int = 0, **params: object) -> SampleRequest:
    sampling = SamplingParams(**{"max_tokens": 64, **params})  # type: ignore[arg-type]
    ids = np.array(tokens, dtype=np.int32)
    return SampleRequest(index, "request", sampling, 5, index, len(tokens), len(tokens), ids, -2.0 * index)


def draw(tokens: list[int], index: int = 0, **params: object) -> SampledToken:
    return LANGUAGE.sample([request(tokens, index, **params)]).tokens[0]


def test_tokens_depend_on_the_sequence_alone() -> None:
    others = [request([index], temperature=1.0) for index in range(20)]
    among_others = LANGUAGE.sample([*others, request([1, 2, 3])]).tokens[-1]
    assert among_others.token_id == draw([1, 2, 3]).token_id
    assert len({draw([1, 2, last], temperature=0.0).token_id for last in range(20)}) > 8


def test_samples_of_a_group_differ_and_repeat() -> None:
    tokens = [[draw([3, 4], index, temperature=3.0).token_id for index in range(16)] for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


def test_log_probabilities_sum_to_one_and_greedy_takes_the_best() -> None:
    after = LANGUAGE.next_token(np.array([9, 8], dtype=np.int32))
    top = LANGUAGE.top(after, 50)
    assert sum(math.exp(logprob) for _, logprob in top) == pytest.approx(1.0)
    assert len({token for token, _ in top}) == 50
    drawn = draw([9, 8], temperature=0.0, logprobs=3)
    assert (drawn.token_id, drawn.logprob) == top[0]
    assert drawn.top == top[:3]


def shares(**params: object) -> dict[int, float]:
    draws = LANGUAGE.sample([request([2, 3], index, **params) for index in range(8000)]).tokens
    return {token: count / 8000 for token, count in Counter(item.token_id for item in draws).items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_the_temperature(temperature: float) -> None:
    after = LANGUAGE.next_token(np.array([2, 3], dtype=np.int32))
    weights = {token: math.exp(logprob / temperature) for token, logprob in LANGUAGE.top(after, 50)}
    total = sum(weights.values())
    drawn = shares(temperature=temperature)
    for token, weight in weights.items():
        assert drawn.get(token, 0.0) == pytest.approx(weight / total, abs=0.02)


def test_filters_keep_what_they_should() -> None:
    after = LANGUAGE.next_token(np.array([2, 3], dtype=np.int32))
    top = LANGUAGE.top(after, 50)
    assert set(shares(top_k=2, temperature=5.0)) == {token for token, _ in top[:2]}
    cut = next(count for count in range(1, 51) if sum(math.exp(value) for _, value in top[:count]) >= 0.8)
    assert set(shares(top_p=0.8)) == {token for token, _ in top[:cut]}
    likely = {token for token, value in top if value >= top[0][1] + math.log(0.1)}
    assert set(shares(min_p=0.1)) == likely


def test_end_of_sequence_waits_for_min_tokens() -> None:
    prompt = next([index] for index in range(10_000) if draw([index], temperature=0.0).token_id == 7)
    assert draw(prompt, temperature=0.0, min_tokens=1).token_id == 8
    assert draw(prompt, temperature=0.0, min_tokens=1, stop_token_ids=(8,)).token_id == 9


def test_a_search_ranks_the_continuations_of_all_its_beams() -> None:
    beams = {0: [4, 5], 1: [4, 6]}
    requests = [request(ids, index, use_beam_search=True, best_of=2, temperature=0.0) for index, ids in beams.items()]
    output = LANGUAGE.sample(requests)
    assert output.tokens == ()
    (search,) = output.beams
    expected = [
        (-2.0 * index + logprob, index, token)
        for index, ids in beams.items()
        for token, logprob in LANGUAGE.top(LANGUAGE.next_token(np.array(ids, dtype=np.int32)), 50)
    ]
    expected.sort(key=lambda item: -item[0])
    found = [(item.cumulative_logprob, item.seq_id, item.token_id) for item in search.candidates]
    assert found == expected[: len(found)]
    assert len(found) == 4


def test_a_search_may_not_end_before_min_tokens() -> None:
    prompt = next([index] for index in range(10_000) if draw([index], temperature=0.0).token_id == 7)
    free, held = (
        LANGUAGE.sample([request(prompt, use_beam_search=True, temperature=0.0, min_tokens=least)]).beams[0]
        for least in (0, 1)
    )
    assert free.candidates[0].token_id == 7
    assert 7 not in {candidate.token_id for candidate in held.candidates}
