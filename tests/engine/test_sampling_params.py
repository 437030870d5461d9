from __future__ import annotations

import pickle

import pytest

from engine.errors import RequestError
from engine.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", True),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("seed", -1),
        ("seed", 1 << 64),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 17),
        ("stop", ["a", "b" * 1025]),
        ("stop", 3),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "ab"),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {5: 101.0}),
        ("logit_bias", [1]),
        ("ignore_eos", 1),
    ],
)
def test_a_value_out_of_range_is_refused_and_named(field: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert caught.value.param == field
    assert field in str(caught.value)


def test_values_are_normalised_and_frozen() -> None:
    params = SamplingParams(stop="end", stop_token_ids=[1, 2], logit_bias={"5": 1})  # type: ignore[arg-type,dict-item]
    assert params.stop == ("end",)
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == {5: 1.0}
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        params.logit_bias[6] = 1.0  # type: ignore[index]


def test_params_survive_pickling() -> None:
    params = SamplingParams(n=2, stop=("a",), logit_bias={1: 2.0}, seed=9)
    assert pickle.loads(pickle.dumps(params)) == params
