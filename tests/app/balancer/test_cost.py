from __future__ import annotations

import pytest

from app.balancer import ReplicaLoad, RequestCost, cost_s
from app.balancer.cost import share_rates

REQUEST = RequestCost(prompt_tokens=100, output_tokens=10)
IDLE = ReplicaLoad("a", 0, 0, 1000, 16, 1000.0, 0.1, 0.01, 0)


def test_an_idle_replica_costs_the_prompt_alone() -> None:
    assert cost_s(REQUEST, IDLE) == pytest.approx(0.1)


def test_queued_prompts_wait_at_the_measured_rate() -> None:
    assert cost_s(REQUEST, IDLE._replace(waiting_tokens=400)) == pytest.approx(0.5)
    assert cost_s(REQUEST, IDLE._replace(waiting_tokens=400, prefill_tokens_per_s=500.0)) == pytest.approx(1.0)


def test_running_sequences_cost_them_and_the_request() -> None:
    # 10 tokens beside 5 sequences, 10 ms each of a step, both ways.
    assert cost_s(REQUEST, IDLE._replace(num_sequences=5)) == pytest.approx(0.1 + 2 * 10 * 5 * 0.01)


def test_missing_blocks_wait_for_sequences_to_end() -> None:
    # 7 blocks needed, 3 free: 4 blocks of 16 steps of 0.1 s, by 2 sequences at once.
    full = IDLE._replace(num_sequences=2, free_blocks=3)
    assert cost_s(REQUEST, full) - cost_s(REQUEST, full._replace(free_blocks=7)) == pytest.approx(4 * 16 * 0.1 / 2)


def test_unmeasured_replicas_have_a_finite_cost() -> None:
    unmeasured = IDLE._replace(prefill_tokens_per_s=0.0, decode_step_s=0.0, decode_sequence_s=0.0, num_sequences=3)
    assert 0 < cost_s(REQUEST, unmeasured) < 60


def test_newcomers_are_taken_to_be_as_fast_as_their_peers() -> None:
    newcomer = IDLE._replace(replica_id="b", prefill_tokens_per_s=0.0, decode_step_s=0.0, decode_sequence_s=0.0)
    shared = share_rates([IDLE, newcomer, IDLE._replace(prefill_tokens_per_s=3000.0)])
    assert shared[1] == IDLE._replace(replica_id="b", prefill_tokens_per_s=2000.0)
    assert share_rates([newcomer]) == [newcomer]
