"""A step's bytes give back every field of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.control.step_codec import StepDecoder, StepEncoder
from engine.memory import BlockCopy
from engine.sampling_params import MAX_SEED, SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

INT32 = st.integers(0, (1 << 31) - 1)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TOKENS = st.lists(INT32, max_size=9).map(lambda values: np.array(values, dtype=np.int32))
COPIES = st.lists(st.builds(BlockCopy, INT32, INT32), max_size=4).map(tuple)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    n = draw(st.integers(1, 4))
    fields: dict[str, Any] = {
        "n": n,
        "best_of": draw(st.none() | st.integers(n, 8)),
        "max_tokens": draw(st.none() | st.integers(100, 1000)),
        "min_tokens": draw(st.integers(0, 100)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1]) | st.floats(0.1, 2.0)),
        "presence_penalty": draw(st.floats(-2.0, 2.0)),
        "frequency_penalty": draw(st.floats(-2.0, 2.0)),
        "logit_bias": draw(st.dictionaries(INT32, st.floats(-100.0, 100.0), max_size=3)),
        "logprobs": draw(st.none() | st.integers(0, 20)),
        "seed": draw(st.none() | st.integers(0, MAX_SEED)),
        "stop": draw(st.lists(st.text(min_size=1, max_size=5), max_size=3)),
        "stop_token_ids": draw(st.lists(INT32, max_size=3)),
        **{name: draw(st.booleans()) for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")},
    }
    if draw(st.booleans()):
        fields |= {"use_beam_search": True, "temperature": 0.0, "length_penalty": draw(st.floats(-2.0, 2.0))}
        fields["early_stopping"] = draw(st.sampled_from([True, False, "never"]))
    else:
        fields |= {"temperature": draw(st.floats(0.0, 2.0)), "top_p": draw(st.floats(0.01, 1.0))}
        fields |= {"min_p": draw(st.floats(0.0, 1.0)), "top_k": draw(st.integers(-1, 50))}
    return SamplingParams(**fields)


def sample_requests() -> st.SearchStrategy[SampleRequest]:
    return st.builds(
        SampleRequest,
        INT64,
        st.text(min_size=1, max_size=8),
        sampling_params(),
        st.integers(0, MAX_SEED),
        INT32,
        INT32,
        INT32,
        TOKENS,
        st.floats(allow_nan=False),
    )


SEQUENCES = st.builds(
    ScheduledSequence, INT64, INT32, TOKENS, TOKENS, st.lists(sample_requests(), max_size=3).map(tuple)
)
STEPS = st.builds(SchedulerOutput, st.lists(SEQUENCES, max_size=4).map(tuple), COPIES, COPIES, COPIES)


def plain(value: Any) -> Any:
    """The same with lists for arrays, which compare, and with the type of every number."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tolist())
    if isinstance(value, SchedulerOutput | SamplingParams):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return (type(value), [plain(item) for item in value])
    return (type(value), value)


def as_it_travels(request: SampleRequest) -> SampleRequest:
    """Tokens so far are sent to those draws alone that read them."""
    if request.sampling_params.has_penalties:
        return request
    return request._replace(token_ids=np.empty(0, dtype=np.int32))


@settings(max_examples=30, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=3))
def test_every_field_comes_back(steps: list[SchedulerOutput]) -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    for step in steps:
        found = decoder.decode(encoder.encode(step))
        scheduled = tuple(
            item._replace(samples=tuple(as_it_travels(request) for request in item.samples)) for item in step.scheduled
        )
        assert plain(found) == plain(dataclasses.replace(step, scheduled=scheduled))


def test_a_request_id_that_is_used_again_brings_its_new_parameters() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    for params in (SamplingParams(temperature=0.5), SamplingParams(temperature=0.7)):
        request = SampleRequest(1, "again", params, 0, 0, 1, 1, np.zeros(1, dtype=np.int32), 0.0)
        tokens = np.zeros(1, dtype=np.int32)
        step = SchedulerOutput((ScheduledSequence(1, 0, tokens, tokens, (request,)),))
        assert decoder.decode(encoder.encode(step)).scheduled[0].samples[0].sampling_params == params


@pytest.mark.parametrize("change", [b"\0", b"\0\0\0\0"])
def test_a_message_of_another_length_is_refused(change: bytes) -> None:
    message = StepEncoder().encode(SchedulerOutput(()))
    with pytest.raises(ValueError, match=r"says that it has|buffer"):
        StepDecoder().decode(message + change)
