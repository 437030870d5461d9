"""DEMAND: what is sent comes back, another version's map does no harm, and no number is taken that would stay wrong."""

from __future__ import annotations

import math

import pytest

from app.transport.demand_messages import DemandShare, decode_demand, encode_demand
from app.transport.errors import FrameError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.messages import Kind


def frame_of(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


def test_a_share_comes_back_as_it_was() -> None:
    share = DemandShare(0.25, 1.5, 300.0, 9e4, 40.0, 2.5)
    assert decode_demand(frame_of(encode_demand(share))) == share


def test_names_of_a_newer_version_are_ignored_and_those_of_an_older_one_default() -> None:
    frame = frame_of(encode_frame(Kind.DEMAND, {"requests": 4, "images": 2}))
    assert decode_demand(frame) == DemandShare(requests=4.0)


@pytest.mark.parametrize(
    "fields",
    [(), (3,), ({"requests": "many"},), ({"requests": -1.0},), ({"queued_s": math.nan},), ({"share": math.inf},)],
)
def test_a_malformed_frame_says_so(fields: tuple[object, ...]) -> None:
    with pytest.raises(FrameError, match="DEMAND"):
        decode_demand(frame_of(encode_frame(Kind.DEMAND, *fields)))
