"""COUNTERS: what is sent comes back, and another version's map does no harm."""

from __future__ import annotations

import dataclasses

import pytest

from app.transport.counter_messages import ReplicaCounters, decode_counters, encode_counters
from app.transport.errors import FrameError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.messages import Kind


def frame_of(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


def test_counters_come_back_as_they_were() -> None:
    names = [entry.name for entry in dataclasses.fields(ReplicaCounters)]
    counters = ReplicaCounters(**{name: type(getattr(ReplicaCounters(), name))(i + 1) for i, name in enumerate(names)})
    assert decode_counters(frame_of(encode_counters(counters))) == counters


def test_names_of_a_newer_version_are_ignored_and_those_of_an_older_one_default() -> None:
    frame = frame_of(encode_frame(Kind.COUNTERS, {"num_steps": 4, "num_moons": 2}))
    assert decode_counters(frame) == ReplicaCounters(num_steps=4)


@pytest.mark.parametrize("fields", [(), ({"num_steps": "many"},), (3,)])
def test_a_malformed_frame_says_so(fields: tuple[object, ...]) -> None:
    with pytest.raises(FrameError, match="COUNTERS"):
        decode_counters(frame_of(encode_frame(Kind.COUNTERS, *fields)))
