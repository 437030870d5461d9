from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.transport.errors import FrameError
from app.transport.frames import FrameDecoder, encode_frame

_FIELDS = st.lists(
    st.recursive(
        st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=8) | st.binary(max_size=8),
        lambda inner: st.lists(inner, max_size=4).map(tuple),
        max_leaves=8,
    ),
    max_size=4,
)


@given(st.lists(st.tuples(st.integers(0, 99), _FIELDS), max_size=5), st.integers(1, 40))
def test_frames_survive_any_cut_of_the_stream(frames: list[tuple[int, list[object]]], piece: int) -> None:
    stream = b"".join(encode_frame(kind, *fields) for kind, fields in frames)
    decoder = FrameDecoder()
    decoded = [frame for start in range(0, len(stream), piece) for frame in decoder.feed(stream[start : start + piece])]
    assert [(frame.kind, list(frame.fields)) for frame in decoded] == frames


def test_an_oversize_frame_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameError, match="exceeds the allowed 100"):
        list(FrameDecoder(100).feed(struct.pack("<I", 101)))


@given(st.binary(min_size=1, max_size=64))
def test_garbage_is_a_frame_error_or_a_frame(body: bytes) -> None:
    try:
        frames = list(FrameDecoder().feed(struct.pack("<I", len(body)) + body))
    except FrameError:
        return
    assert [type(frame.kind) for frame in frames] == [int]


def test_the_bound_may_change_between_two_frames_of_one_read() -> None:
    decoder = FrameDecoder(16)
    frames = decoder.feed(encode_frame(1) + encode_frame(2, b"x" * 100))
    assert next(frames).kind == 1
    decoder.max_bytes = 1000
    assert next(frames).fields == (b"x" * 100,)
