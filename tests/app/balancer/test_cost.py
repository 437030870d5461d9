from __future__ import annotations

import pytest

from app.balancer import CostWeights, ReplicaLoad, RequestCost, cost_s

REQUEST = RequestCost(prompt_tokens=100, output_tokens=10)
IDLE = ReplicaLoad(0.0, 0, 1000, 1000, 0.0, 16, 1000.0, 0.1, 0.01)
PLAIN = CostWeights(crowding=0.0, reuse=0.0)


def cost(load: ReplicaLoad, num_cached_blocks: int = 0, weights: CostWeights = PLAIN) -> float:
    return cost_s(REQUEST, load, num_cached_blocks, weights)


def test_an_idle_replica_costs_the_prompt_alone() -> None:
    assert cost(IDLE) == pytest.approx(0.1)
    assert cost(IDLE._replace(prefill_tokens_per_s=500.0)) == pytest.approx(0.2)


def test_waiting_is_added() -> None:
    assert cost(IDLE._replace(wait_s=0.4)) == pytest.approx(0.5)


def test_cached_blocks_are_not_computed_but_one_token_always_is() -> None:
    assert cost(IDLE, num_cached_blocks=5) == pytest.approx(0.02)
    assert cost(IDLE, num_cached_blocks=7) == pytest.approx(0.001)


def test_work_crowds_out_what_comes_later() -> None:
    assert cost(IDLE, weights=PLAIN._replace(crowding=0.5)) == pytest.approx(0.15)


def test_running_sequences_cost_them_and_the_request() -> None:
    # 10 tokens beside 5 sequences, 10 ms each of a step, both ways.
    assert cost(IDLE._replace(num_sequences=5)) == pytest.approx(0.1 + 2 * 10 * 5 * 0.01)


def test_missing_blocks_wait_for_sequences_to_end() -> None:
    # 7 blocks needed, 3 free: 4 blocks of 16 steps of 0.1 s, by 2 sequences at once.
    full = IDLE._replace(num_sequences=2, free_blocks=3, empty_blocks=3)
    enough = full._replace(free_blocks=7, empty_blocks=7)
    assert cost(full) - cost(enough) == pytest.approx(4 * 16 * 0.1 / 2)


def test_evicting_costs_what_would_have_been_used_again() -> None:
    # 7 blocks needed, 2 of them empty: 5 go, each worth 16 ms with probability 1/2, and 1/4 after a half-life.
    weights = CostWeights(crowding=0.0, reuse=0.5, reuse_half_life_s=60.0)
    full = IDLE._replace(empty_blocks=2)
    assert cost(full, weights=weights) == pytest.approx(0.1 + 5 * 0.5 * 0.016)
    assert cost(full._replace(cache_age_s=60.0), weights=weights) == pytest.approx(0.1 + 5 * 0.25 * 0.016)
    assert cost(IDLE, weights=weights) == pytest.approx(0.1)


def test_an_adapter_that_is_not_there_is_loaded_and_may_have_to_wait_for_a_slot() -> None:
    there = IDLE._replace(adapter_load_s=0.7)
    lacking = there._replace(lacks_adapter=True, num_free_adapter_slots=2)
    assert cost(there) == cost(IDLE)
    assert cost(lacking) - cost(IDLE) == pytest.approx(0.7)
    # About the 10 steps of 0.1 s that a request decodes for.
    assert cost(lacking._replace(num_free_adapter_slots=0)) - cost(lacking) == pytest.approx(10 * 0.1)
