"""What is timed is what reaches the ranks."""

from __future__ import annotations

import pytest

from benchmarks.parallel.control import decode_step, measure_control
from engine.control.futex import futexes_work


@pytest.mark.skipif(not futexes_work(), reason="needs Linux on x86-64")
def test_every_step_reaches_every_rank_and_costs_time() -> None:
    cost = measure_control(3, 4, context=64, steps=30)
    assert 0.0 < cost.encode_us <= cost.median_us <= cost.p99_us
    assert cost.message_bytes > 4 * (4 * 64 // 16)


def test_a_step_decodes_one_token_of_each_sequence() -> None:
    step = decode_step(3, 40)
    assert [item.start for item in step.scheduled] == [39] * 3
    blocks = [block for item in step.scheduled for block in item.block_table.tolist()]
    assert sorted(blocks) == list(range(9)), "no block is two sequences'"
