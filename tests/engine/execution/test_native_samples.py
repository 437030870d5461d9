"""Tokens that C++ draws, against the Python Sampler on the same logits and the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.decoding.random import draws_of
from engine.decoding.sampler import Sampler, _candidates
from engine.execution.native_samples import NativeSamples
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import KernelLibrary
from engine.loading.stored_tensor import FloatArray
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, SamplerOutput
from tests.engine.kernels.table_decoder import Step, TableDecoder, pack_floats

EOS = 1
VOCAB_SIZE = 9001  # no multiple of any vector, and more than the sampler looks at first
NUM_DRAWS = 60
RNG = np.random.default_rng(2)


def peaked() -> FloatArray:
    return np.asarray(RNG.normal(size=VOCAB_SIZE) * 4, dtype=np.float32)


def flat() -> FloatArray:
    return np.asarray(RNG.normal(size=VOCAB_SIZE) * 0.1, dtype=np.float32)


def tied() -> FloatArray:
    """Few values, each many times, the largest too."""
    return RNG.integers(-3, 4, VOCAB_SIZE).astype(np.float32)


def with_infinities() -> FloatArray:
    logits = peaked()
    logits[RNG.random(VOCAB_SIZE) < 0.9] = -np.inf
    logits[:3] = -np.inf
    return logits


def huge() -> FloatArray:
    """Too large for an exponential, and for their differences."""
    logits = peaked()
    logits[::2] *= 1e37
    logits[17] = logits[4444] = 3.3e38
    return logits


def small() -> FloatArray:
    return np.array([0.5, -1.0, 0.5], dtype=np.float32)


LOGITS = {make.__name__: make() for make in (peaked, flat, tied, with_infinities, huge, small)}
PARAMS: dict[str, dict[str, Any]] = {
    "temperature-1": {},
    "temperature-0.3": {"temperature": 0.3},
    "temperature-30": {"temperature": 30.0},
    "temperature-1e-39": {"temperature": 1e-39},
    "temperature-1e-300": {"temperature": 1e-300},
    "top_k-1": {"top_k": 1},
    "top_k-50": {"top_k": 50},
    "top_k-5000": {"top_k": 5000},
    "top_k-of-more-than-all": {"top_k": 1 << 31},
    "top_k-all": {"top_k": -1},
    "top_p-0.9": {"top_p": 0.9},
    "top_p-0.999": {"top_p": 0.999, "temperature": 2.0},
    "top_p-least": {"top_p": 1e-9},
    "top_p-1e-50": {"top_p": 1e-50},
    "min_p-1e-60": {"min_p": 1e-60},
    "min_p-0.1": {"min_p": 0.1},
    "min_p-1": {"min_p": 1.0},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    "top_p-and-min_p": {"top_p": 0.8, "min_p": 0.3, "temperature": 1.7},
    "top_k-and-top_p": {"top_k": 300, "top_p": 0.5},
}


def request(i: int, params: SamplingParams, request_id: str = "r", logprob: float = 0.0) -> SampleRequest:
    return SampleRequest(i, request_id, params, 7, i, 3, 2, np.array([1, 2, 3], np.int32), logprob)


def decoder_of(library: KernelLibrary, logits: FloatArray) -> TableDecoder:
    """Whose logits are these after every token."""
    table = pack_floats(library, np.zeros((len(logits), 2)))
    return TableDecoder(library, table, table, bias=logits)


def draw(library: KernelLibrary, logits: FloatArray, requests: list[SampleRequest]) -> SamplerOutput:
    samples = NativeSamples(requests, [0] * len(requests), len(logits), (EOS,))
    step = Step([0], samples.samples)
    decoder_of(library, logits).run(step.params)
    return samples.results(Sampler((EOS,)))


def reference(logits: FloatArray, requests: list[SampleRequest]) -> SamplerOutput:
    with np.errstate(over="ignore"):
        return Sampler((EOS,)).sample(logits[None], requests, [0] * len(requests))


def is_drawn(logits: FloatArray, params: SamplingParams, draw: float, token_id: int) -> bool:
    """Whether the token's part of the cumulative distribution holds the draw, give or take the rounding of floats."""
    with np.errstate(over="ignore"):
        tokens, weights = _candidates(logits, params)
    keep = weights >= params.min_p * weights.max() * (1 - 1e-5)
    tokens, weights = tokens[keep], weights[keep]
    cumulative = np.cumsum(weights) / weights.sum()
    (places,) = np.nonzero(tokens == token_id)
    if not len(places):
        return False
    place = int(places[0])
    before = cumulative[place - 1] if place else 0.0
    return bool(before - 1e-4 <= draw <= cumulative[place] + 1e-4)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("shape", LOGITS)
def test_draws_are_the_samplers(shape: str, name: str, cpu: CpuBackend) -> None:
    logits, params = LOGITS[shape], SamplingParams(**PARAMS[name])
    requests = [request(i, params) for i in range(NUM_DRAWS)]
    found = [token.token_id for token in draw(cpu.library, logits, requests).tokens]
    expected = [token.token_id for token in reference(logits, requests).tokens]
    draws = draws_of(requests)
    for i in range(NUM_DRAWS):
        if found[i] != expected[i]:
            assert is_drawn(logits, params, draws[i], found[i]), f"{found[i]} for {draws[i]}, not {expected[i]}"
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 2


@pytest.mark.parametrize("shape", LOGITS)
def test_every_instruction_set_draws_the_same(shape: str, isa: str, cpu: CpuBackend) -> None:
    requests = [request(i, SamplingParams(**params)) for i, params in enumerate(PARAMS.values())]
    requests += [request(90 + i, SamplingParams(temperature=0.0, logprobs=i)) for i in range(4)]
    found = draw(cpu.library, LOGITS[shape], requests).tokens
    expected = reference(LOGITS[shape], requests).tokens
    assert [token.token_id for token in found] == [token.token_id for token in expected], isa


@pytest.mark.parametrize("logprobs", [None, 0, 1, 5, 20])
@pytest.mark.parametrize("shape", LOGITS)
def test_greedy_tokens_and_logprobs_are_the_samplers(shape: str, logprobs: int | None, cpu: CpuBackend) -> None:
    """Ties go to the lowest id; log-probabilities are the model's own, whatever the temperature."""
    logits = LOGITS[shape]
    for temperature in (0.0, 0.7):
        # The second so that what follows the first's most likely tokens is not theirs.
        requests = [request(i, SamplingParams(temperature=temperature, logprobs=logprobs)) for i in range(2)]
        found = draw(cpu.library, logits, requests).tokens[0]
        expected = reference(logits, requests).tokens[0]
        assert found.token_id == expected.token_id
        assert found.logprob == pytest.approx(expected.logprob, rel=1e-5, abs=1e-5, nan_ok=True)
        assert [token for token, _ in found.top] == [token for token, _ in expected.top]
        assert [value for _, value in found.top] == pytest.approx(
            [value for _, value in expected.top], rel=1e-5, abs=1e-5
        )


def test_ranked_samples_bring_their_logprobs(cpu: CpuBackend) -> None:
    requests = [request(i, SamplingParams(n=1, best_of=3)) for i in range(3)]
    found = draw(cpu.library, LOGITS["peaked"], requests).tokens
    expected = reference(LOGITS["peaked"], requests).tokens
    for one, other in zip(found, expected, strict=True):
        assert one[:2] == other[:2]
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"logprobs": 20}, {"logit_bias": {}}, {"min_tokens": 4}])
@pytest.mark.parametrize("shape", ["peaked", "flat", "tied", "with_infinities", "small"])
def test_beams_are_the_samplers(shape: str, extra: dict[str, Any], cpu: CpuBackend) -> None:
    """Two searches and a sample in one step."""
    logits = LOGITS[shape]
    if "logit_bias" in extra:
        extra = {"logit_bias": {len(logits) - 1: 9.0}}
    wide = SamplingParams(n=3, temperature=0.0, use_beam_search=True, **extra)
    narrow = SamplingParams(n=1, best_of=2, temperature=0.0, use_beam_search=True)
    requests = [request(i, wide, "wide", -0.7 * i) for i in range(3)]
    requests.insert(1, request(8, SamplingParams(seed=1), "other"))
    requests += [request(10 + i, narrow, "narrow", logprob) for i, logprob in enumerate((-2.0, -1.0))]
    found, expected = draw(cpu.library, logits, requests), reference(logits, requests)
    assert [token[:2] for token in found.tokens] == [token[:2] for token in expected.tokens]
    ours = {search.request_id: search.candidates for search in found.beams}
    theirs = {search.request_id: search.candidates for search in expected.beams}
    assert ours.keys() == theirs.keys()
    for name, candidates in theirs.items():
        assert len(ours[name]) == len(candidates)
        for one, other in zip(ours[name], candidates, strict=True):
            assert one[:2] == other[:2], name
            assert one[2:4] == pytest.approx(other[2:4], rel=1e-5, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "temperature": 0.0},
        {"logit_bias": {3: 50.0}},
        {"min_tokens": 5},
    ],
    ids=lambda params: next(iter(params)),
)
def test_what_changes_logits_is_drawn_in_python(params: dict[str, Any], cpu: CpuBackend) -> None:
    """Beside one that changes nothing; both in the order of their requests' ids."""
    logits = LOGITS["peaked"]
    requests = [request(0, SamplingParams(**params, logprobs=2)), request(1, SamplingParams(logprobs=2))]
    found = {token.seq_id: token for token in draw(cpu.library, logits, requests).tokens}
    for expected in reference(logits, requests).tokens:
        token = found[expected.seq_id]
        assert token.token_id == expected.token_id
        assert token.logprob == pytest.approx(expected.logprob, rel=1e-5)


def test_several_rows_draw_from_their_own_logits(cpu: CpuBackend) -> None:
    library = cpu.library
    rows = np.asarray(RNG.normal(size=(4, 300)) * 3, dtype=np.float32)
    # Unit vectors pick a column of the head: token i's logits are row i.
    decoder = TableDecoder(library, pack_floats(library, np.eye(300, 4)), pack_floats(library, rows.T))
    requests = [request(i, SamplingParams(temperature=0.9, top_p=0.9, logprobs=1)) for i in range(9)]
    places = [3, 0, 1, 1, 2, 3, 3, 0, 2]
    samples = NativeSamples(requests, places, 300, (EOS,))
    decoder.run(Step([0, 1, 2, 3], samples.samples).params)
    found = samples.results(Sampler((EOS,))).tokens
    expected = Sampler((EOS,)).sample(rows, requests, places).tokens
    assert [token[:2] for token in found] == [token[:2] for token in expected]
