from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.transport.errors import FrameError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.messages import (
    Draining,
    Kind,
    LoadReport,
    StepMessage,
    decode_abort,
    decode_draining,
    decode_load,
    decode_refused,
    decode_step,
    decode_stop,
    decode_subscribe,
    encode_abort,
    encode_draining,
    encode_load,
    encode_refused,
    encode_stop,
    encode_subscribe,
)
from engine.outputs import SequenceOutput, TokenLogprobs


def parse(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


_TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=3)
_ROWS = st.lists(
    st.tuples(
        st.integers(1, 2**40),
        st.integers(0, 127),
        _TOKENS,
        st.sampled_from((None, "stop", "length", "abort", "error")),
        st.none() | st.integers(0, 99),
        st.integers(0, 99),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(_ROWS)
def test_a_step_arrives_as_it_left(
    rows: list[tuple[int, int, list[int], str | None, int | None, int, bool]],
) -> None:
    message = StepMessage()
    expected = []
    for attempt, index, tokens, finish_reason, final_count, cached, logged in rows:
        logprobs = [TokenLogprobs(-0.5, ((token, -0.5), (7, -1.25))) for token in tokens] if logged and tokens else None
        output = SequenceOutput(
            "",
            index,
            tokens,
            logprobs,
            finish_reason,  # type: ignore[arg-type]
            num_cached_tokens=cached,
            request_finished=final_count is not None,
        )
        message.add(attempt, output, final_count)
        expected.append((attempt, output, final_count))
    assert decode_step(parse(message.encode())) == expected


def test_a_plain_decode_step_takes_few_bytes_a_token() -> None:
    message = StepMessage()
    for attempt in range(1000, 1032):
        message.add(attempt, SequenceOutput("ignored", 0, [40_000]), None)
    assert len(message.encode()) < 32 * 7


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(Kind.STEP),
        encode_frame(Kind.STEP, [1], [], [2], [5], []),
        encode_frame(Kind.STEP, [1, 2], [0], [], [5, 6], []),
        encode_frame(Kind.STEP, [1], [], [], [5], [[0, "vanished", None, 0, None, None]]),
        encode_frame(Kind.STEP, 7, [], [], [5], []),
        encode_frame(Kind.STEP, [1], [], [], [5], [[0, None]]),
    ],
)
def test_a_malformed_step_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameError):
        decode_step(parse(frame))


def test_a_load_of_another_version_is_understood_as_far_as_it_goes() -> None:
    load = LoadReport(num_blocks=10, num_free_blocks=3, decode_step_s=0.5, admitted=(4, 5), adapters=("sql", "chat"))
    assert decode_load(parse(encode_load(load))) == load
    newer = encode_frame(Kind.LOAD, {"num_blocks": 10, "swap_blocks": 7})
    assert decode_load(parse(newer)) == LoadReport(num_blocks=10)
    with pytest.raises(FrameError):
        decode_load(parse(encode_frame(Kind.LOAD, {"num_blocks": "many"})))


def test_small_messages_round_trip() -> None:
    assert decode_abort(parse(encode_abort([3, 4]))) == (3, 4)
    assert decode_refused(parse(encode_refused([3, 4]))) == (3, 4)
    assert decode_subscribe(parse(encode_subscribe("ingress"))) == "ingress"
    assert decode_draining(parse(encode_draining(Draining(2.5, "stop")))) == Draining(2.5, "stop")
    for broken in (encode_frame(Kind.ABORT), encode_frame(Kind.ABORT, ["x"])):
        with pytest.raises(FrameError):
            decode_abort(parse(broken))
    with pytest.raises(FrameError, match="REFUSED"):
        decode_refused(parse(encode_frame(Kind.REFUSED, ["x"])))
    for broken in (encode_frame(Kind.SUBSCRIBE), encode_frame(Kind.SUBSCRIBE, ""), encode_frame(Kind.SUBSCRIBE, 3)):
        with pytest.raises(FrameError):
            decode_subscribe(parse(broken))
    with pytest.raises(FrameError):
        decode_draining(parse(encode_frame(Kind.DRAINING, "soon")))


def test_a_stop_names_one_sequence() -> None:
    assert decode_stop(parse(encode_stop(7, 2))) == (7, 2)
    for fields in ((), (1,), ("1", 2), (1, None)):
        with pytest.raises(FrameError, match="malformed STOP"):
            decode_stop(parse(encode_frame(Kind.STOP, *fields)))


def test_how_long_a_request_waited_comes_with_its_first_tokens() -> None:
    message = StepMessage()
    message.add(1, SequenceOutput("", 0, [5], waited_s=0.25), None)
    message.add(2, SequenceOutput("", 0, [6]), None)
    frame = parse(message.encode())
    assert [row.output.waited_s for row in decode_step(frame)] == [0.25, 0.0]
    # A replica of an older version does not send it.
    *columns, extras = frame.fields
    older = parse(encode_frame(Kind.STEP, *columns, [extra[:6] for extra in extras]))
    assert [row.output.waited_s for row in decode_step(older)] == [0.0, 0.0]
