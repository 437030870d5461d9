"""The replay asks of its replicas what the trace asks of theirs."""

from __future__ import annotations

import pytest

from benchmarks.fleet.workload import FleetShape, due_times, scaled_request
from benchmarks.routing.trace import Arrival, TracedRequest
from engine.errors import ConfigError

SHAPE = FleetShape(4, 2, num_blocks=100, prefill_tokens_per_s=12000.0, scale=1 / 16, speed=3.0, step_s=0.02)


def arrival(time_s: float, *blocks: int) -> Arrival:
    return Arrival(time_s, TracedRequest(0.0, 512 * len(blocks), 160, blocks), 0)


def test_blocks_lengths_and_prices_shrink_together() -> None:
    assert SHAPE.block_size == 32
    request = scaled_request(arrival(0.0, 1, 2, 3), SHAPE)
    assert len(request.prompt) == 3 * 32
    assert request.num_output_tokens == 10
    # As many seconds of the replay, times its speed, as of the trace.
    assert len(request.prompt) / SHAPE.replica_tokens_per_s * SHAPE.speed == pytest.approx(3 * 512 / 12000)


def test_prompts_share_the_blocks_that_the_trace_shares() -> None:
    first, second = (scaled_request(arrival(0.0, *blocks), SHAPE).prompt for blocks in ((1, 2, 3), (1, 2, 4)))
    assert first[:64] == second[:64]
    assert first[64:96] != second[64:96]


def test_the_first_request_is_due_at_once() -> None:
    assert due_times([arrival(30.0, 1), arrival(36.0, 2)], 3.0) == [0.0, 2.0]


def test_a_scale_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"scale=0.3 gives blocks of 153.6 tokens"):
        _ = SHAPE._replace(scale=0.3).block_size
