from __future__ import annotations

import asyncio
import threading

import pytest

from app.replica.stream import Stream

pytestmark = pytest.mark.anyio


def make_stream() -> Stream:
    return Stream(key="k", request_id="r", ingress_id="i", attempt=1, submitted_s=0.0)


@pytest.mark.parametrize("ended_first", [True, False])
async def test_the_call_returns_once_the_stream_has_ended_whichever_is_first(ended_first: bool) -> None:
    stream = make_stream()
    if ended_first:
        stream.end()
    done = stream.claim()
    if not ended_first:
        await asyncio.sleep(0)
        assert not done.done()
        # As the server's thread does.
        ender = threading.Thread(target=stream.end)
        ender.start()
        ender.join()
    await asyncio.wait_for(done, 10)
    stream.end()
    await asyncio.sleep(0)


def test_a_call_whose_loop_is_closed_is_not_waited_for() -> None:
    stream = make_stream()

    async def claim() -> None:
        stream.claim()

    asyncio.run(claim())
    stream.end()
    assert stream.ended


def test_the_reply_has_the_reasons_in_the_order_of_the_sequences() -> None:
    stream = make_stream()
    stream.finish_reasons = {1: "stop", 0: "length"}
    stream.num_output_tokens, stream.num_cached_tokens = 5, 2
    assert stream.record() == {
        "request_id": "r",
        "attempt": 1,
        "num_output_tokens": 5,
        "num_cached_tokens": 2,
        "finish_reasons": ["length", "stop"],
    }
