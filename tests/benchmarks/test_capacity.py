"""What the capacity benchmark makes of its measurements."""

from __future__ import annotations

import pytest

from app.autoscaling.capacity import Pace
from benchmarks.capacity import Closed, Offered, broken_at, pace_of


def offered(rate: float, ttft_s: float) -> Offered:
    return Offered(rate, 100, 0.5, ttft_s, 0.02, 0.02)


def test_where_the_target_breaks_lies_between_two_rates() -> None:
    assert broken_at([offered(2.0, 0.2), offered(4.0, 0.5), offered(6.0, 2.5)], 1.0) == pytest.approx(4.5)
    assert broken_at([offered(2.0, 0.2), offered(4.0, 0.5)], 1.0) is None
    assert broken_at([offered(2.0, 1.2), offered(4.0, 1.5)], 1.0) is None


def test_a_pace_is_found_again_in_what_it_brings() -> None:
    pace, prompt_tokens, output_tokens, streams = Pace(2000.0, 0.01, 0.004), 64, 32, 8
    prompt_s = prompt_tokens / pace.prompt_tokens_per_s
    one = Closed(prompt_s + pace.step_s, pace.decode_s(1), 1.0)
    request_s = prompt_s + output_tokens * pace.decode_s(streams) / streams
    found = pace_of(one, Closed(0.5, 0.1, 1 / request_s), streams, prompt_tokens, output_tokens)
    assert tuple(found)[:3] == pytest.approx(tuple(pace)[:3], rel=1e-3)
