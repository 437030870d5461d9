"""SUBMIT: a request comes back as it was, another version's is left to its call, and what is no request says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from app.transport.errors import FrameError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.messages import Kind
from app.transport.submit_messages import Submission, decode_submit, encode_submit
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import MAX_SEED, SamplingParams

FULL = SamplingParams(
    n=2,
    best_of=3,
    max_tokens=None,
    min_tokens=1,
    temperature=0.5,
    top_p=0.9,
    top_k=5,
    min_p=0.1,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.2,
    logit_bias={7: -1.5},
    logprobs=2,
    seed=MAX_SEED,
    stop=("end", "ß"),
    stop_token_ids=(3, 4),
    ignore_eos=True,
    include_stop_str_in_output=True,
    skip_special_tokens=False,
)
BEAMS = SamplingParams(
    best_of=4, use_beam_search=True, temperature=0.0, length_penalty=0.7, early_stopping="never", max_tokens=4
)
RESUMED = (ResumedSequence((5, 6), -1.25, False), ResumedSequence((), 0.0, True))


def frame_of(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


def fields_of(request: EngineRequest) -> dict[str, Any]:
    return {entry.name: getattr(request, entry.name) for entry in dataclasses.fields(request) if entry.compare}


@pytest.mark.parametrize(
    "request_",
    [
        EngineRequest("plain", [1], SamplingParams()),
        EngineRequest("full", [0, 70000, 2**31], FULL, "tenant", "base:adapter", RESUMED),
        EngineRequest("beams", (1, 2), BEAMS),
    ],
    ids=lambda request: request.request_id,
)
def test_a_request_comes_back_as_it_was(request_: EngineRequest) -> None:
    submission = decode_submit(frame_of(encode_submit(Submission(9, request_, 1.5, {"traceparent": "00-1"}, 40))))
    assert submission is not None
    assert (submission.attempt, submission.waited_s, submission.trace) == (9, 1.5, {"traceparent": "00-1"})
    assert submission.uncached_tokens == 40
    assert submission.request.sampling_params == request_.sampling_params
    expected = fields_of(request_) | {"prompt_token_ids": list(request_.prompt_token_ids)}
    got = fields_of(submission.request)
    for name in ("arrival_time",):
        del expected[name], got[name]
    assert got == expected


def test_an_older_ingress_tells_nothing_of_what_is_cached() -> None:
    values = {"request_id": "r", "prompt_token_ids": [1], "sampling_params": {}, "resumed": ()}
    submission = decode_submit(frame_of(encode_frame(Kind.SUBMIT, 1, values, 0.0, None)))
    assert submission is not None
    assert submission.uncached_tokens == 0


def test_every_parameter_is_tried() -> None:
    tried = (FULL, BEAMS)
    for entry in dataclasses.fields(SamplingParams):
        default = SamplingParams()
        assert any(getattr(params, entry.name) != getattr(default, entry.name) for params in tried), entry.name


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", ()), ("sampling_params", {"speculative": 3}), ("sampling_params", {"top_p": 7.0}), ("request_id", "")],
)
def test_what_is_unknown_or_refused_is_left_to_the_call(name: str, value: object) -> None:
    values = {"request_id": "r", "prompt_token_ids": [1], "sampling_params": {}, "resumed": (), name: value}
    assert decode_submit(frame_of(encode_frame(Kind.SUBMIT, 1, values, 0.0, None))) is None


@pytest.mark.parametrize(
    "fields",
    [
        (),
        ("one", {"sampling_params": {}}, 0.0, None),
        (1, {}, 0.0, None),
        (1, 5, 0.0, None),
        (1, {"request_id": "r", "prompt_token_ids": 5, "sampling_params": {}, "resumed": ()}, 0.0, None),
        (1, {"request_id": "r", "prompt_token_ids": (1,), "sampling_params": {}, "resumed": (5,)}, 0.0, None),
        (1, {"request_id": "r", "prompt_token_ids": (1,), "sampling_params": {}, "resumed": ()}, "late", None),
        (1, {"request_id": "r", "prompt_token_ids": (1,), "sampling_params": {}, "resumed": ()}, 0.0, {"a": 1}),
        (1, {"request_id": "r", "prompt_token_ids": (1,), "sampling_params": {}, "resumed": ()}, 0.0, None, "many"),
    ],
)
def test_a_malformed_frame_says_so(fields: tuple[object, ...]) -> None:
    with pytest.raises(FrameError, match="SUBMIT"):
        decode_submit(frame_of(encode_frame(Kind.SUBMIT, *fields)))
