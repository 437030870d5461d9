"""A step's bytes give back all that ranks compute from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import NO_CHANGES, AdapterChanges, AdapterLoad, LoraAdapter
from engine.control.step_codec import DRAWN_BY_RANK_0, decode_step, encode_step
from engine.memory import BlockCopy
from engine.sampling_params import MAX_SEED, SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

INT32 = st.integers(0, (1 << 31) - 1)
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
TOKENS = st.lists(INT32, max_size=9).map(lambda values: np.array(values, dtype=np.int32))
COPIES = st.lists(st.builds(BlockCopy, INT32, INT32), max_size=4).map(tuple)


def sample_requests() -> st.SearchStrategy[SampleRequest]:
    return st.builds(
        SampleRequest,
        INT64,
        st.text(min_size=1, max_size=8),
        st.builds(SamplingParams, temperature=st.floats(0.0, 2.0), presence_penalty=st.floats(-2.0, 2.0)),
        st.integers(0, MAX_SEED),
        INT32,
        INT32,
        INT32,
        TOKENS,
        st.floats(allow_nan=False),
    )


SEQUENCES = st.builds(
    ScheduledSequence,
    INT64,
    INT32,
    TOKENS,
    TOKENS,
    st.lists(sample_requests(), max_size=3).map(tuple),
    st.integers(-1, 4095),
)
ADAPTERS = {name: LoraAdapter(name, f"s3://adapters/{name}", {}, {}) for name in ("sql", "näher", "c")}
SLOTS = st.lists(st.integers(0, 4095), max_size=3, unique=True).map(tuple)
LOADS = st.lists(
    st.builds(AdapterLoad, st.integers(0, 4095), st.sampled_from(list(ADAPTERS.values())), st.none()), max_size=3
)
CHANGES = st.builds(AdapterChanges, SLOTS, LOADS.map(tuple)) | st.just(NO_CHANGES)
STEPS = st.builds(SchedulerOutput, st.lists(SEQUENCES, max_size=4).map(tuple), COPIES, COPIES, COPIES, CHANGES)


def plain(value: Any) -> Any:
    """The same with lists for arrays, which compare, and with the type of every number."""
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.tolist())
    if isinstance(value, SchedulerOutput | SamplingParams):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return (type(value), [plain(item) for item in value])
    return (type(value), value)


def own_part(name: str, source: str) -> tuple[LoraAdapter, object]:
    assert ADAPTERS[name].source == source
    return ADAPTERS[name], None


def as_others_run_it(item: ScheduledSequence) -> ScheduledSequence:
    """Ranks that do not draw learn of which rows the logits are wanted, and no more."""
    return item._replace(samples=DRAWN_BY_RANK_0 if item.samples else ())


@settings(max_examples=30, deadline=None)
@given(STEPS)
def test_every_field_that_is_computed_from_comes_back(step: SchedulerOutput) -> None:
    expected = dataclasses.replace(step, scheduled=tuple(map(as_others_run_it, step.scheduled)))
    assert plain(decode_step(encode_step(step), own_part)) == plain(expected)


def test_how_tokens_are_drawn_is_told_nobody() -> None:
    tokens = np.zeros(1, dtype=np.int32)

    def step(params: SamplingParams, request_id: str) -> SchedulerOutput:
        request = SampleRequest(1, request_id, params, 5, 0, 1, 1, np.arange(99, dtype=np.int32), -2.0)
        return SchedulerOutput((ScheduledSequence(1, 0, tokens, tokens, (request,)),))

    plainly, penalised = SamplingParams(), SamplingParams(repetition_penalty=1.5, logit_bias={3: 1.0})
    assert encode_step(step(plainly, "one")) == encode_step(step(penalised, "another"))


@pytest.mark.parametrize("change", [b"\0", b"\0\0\0\0"])
def test_a_message_of_another_length_is_refused(change: bytes) -> None:
    message = encode_step(SchedulerOutput(()))
    with pytest.raises(ValueError, match=r"says that it has|buffer"):
        decode_step(message + change, own_part)
    with pytest.raises(ValueError, match=r"says that it has|buffer"):
        decode_step(message[: -len(change)], own_part)
