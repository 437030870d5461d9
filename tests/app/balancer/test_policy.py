from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.balancer import CheapestPolicy, Policy, RequestCost, cost_s
from app.balancer.fleet import Fleet
from app.balancer.policies import POLICIES, make_policy
from app.transport.messages import LoadReport

LOAD = LoadReport(
    num_blocks=100,
    num_free_blocks=100,
    num_empty_blocks=100,
    prefill_tokens_per_s=1000.0,
    decode_step_s=0.02,
    decode_sequence_s=1e-6,
)


def fleet_of(waits: list[float], held: dict[int, int] | None = None) -> Fleet:
    """Replicas that wait so long, and hold so many leading blocks of the chain 0, 1, 2 ..."""
    fleet = Fleet()
    for slot, wait_s in enumerate(waits):
        assert fleet.add(f"r{slot}", 16, LOAD, wait_s) == slot
    for slot, num_blocks in (held or {}).items():
        fleet.index.store(slot, range(num_blocks))
    return fleet


def request(num_blocks: int) -> RequestCost:
    return RequestCost(16 * num_blocks + 1, 20, 1, tuple(range(num_blocks)))


def everyone(fleet: Fleet) -> int:
    return (1 << len(fleet)) - 1


@settings(max_examples=200, deadline=None)
@given(
    waits=st.lists(st.floats(0, 0.5), min_size=1, max_size=12),
    held=st.dictionaries(st.integers(0, 11), st.integers(1, 12)),
    num_blocks=st.integers(0, 12),
    data=st.data(),
)
def test_the_cheapest_is_found_without_pricing_all(
    waits: list[float], held: dict[int, int], num_blocks: int, data: st.DataObject
) -> None:
    held = {slot: depth for slot, depth in held.items() if slot < len(waits)}
    fleet = fleet_of(waits, held)
    among = data.draw(st.sets(st.integers(0, len(waits) - 1), min_size=1))
    policy = CheapestPolicy()
    choice = policy.choose(request(num_blocks), fleet, sum(1 << slot for slot in among))
    prices = {
        slot: cost_s(request(num_blocks), fleet.load_of(slot), min(held.get(slot, 0), num_blocks), policy.weights)
        for slot in among
    }
    assert choice.slot in among
    assert choice.cost_s == pytest.approx(min(prices.values()))
    assert prices[choice.slot] == pytest.approx(choice.cost_s)
    assert choice.num_cached_blocks == min(held.get(choice.slot, 0), num_blocks)


def test_of_a_thousand_equals_one_with_the_prefix_and_little_to_do_is_found() -> None:
    waits = [0.2 + slot / 10000 for slot in range(1000)]
    waits[700] = 0.0
    fleet = fleet_of(waits, dict.fromkeys(range(0, 1000, 2), 4) | {999: 40})
    assert CheapestPolicy().choose(request(4), fleet, everyone(fleet)).slot == 700
    assert CheapestPolicy().choose(request(40), fleet, everyone(fleet)).slot == 999


def test_long_prompts_keep_to_their_lane_while_that_is_cheap() -> None:
    fleet = fleet_of([0.0, 0.0, 0.0, 0.0])
    policy = CheapestPolicy()
    policy.placed(0.1)
    assert policy.choose(request(4), fleet, everyone(fleet)).slot % 2 == 0
    assert policy.choose(request(60), fleet, everyone(fleet)).slot % 2 == 1
    fleet.set_free_at(1, 5.0)
    fleet.set_free_at(3, 5.0)
    assert policy.choose(request(60), fleet, everyone(fleet)).slot % 2 == 0


def test_the_more_are_held_back_the_more_a_cached_prefix_is_worth() -> None:
    fleet = fleet_of([0.0, 0.5], {1: 20})
    policy = CheapestPolicy()
    assert policy.choose(request(20), fleet, 0b11).slot == 0
    fleet.num_held = 4
    assert policy.choose(request(20), fleet, 0b11).slot == 1


def chosen(policy: Policy, fleet: Fleet, num_blocks: int = 0) -> int:
    return policy.choose(request(num_blocks), fleet, everyone(fleet)).slot


def test_round_robin_goes_round() -> None:
    fleet = fleet_of([0.0] * 3)
    policy = make_policy("round_robin")
    assert [chosen(policy, fleet) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert policy.choose(request(0), fleet, 0b011).slot == 0


def test_power_of_two_never_takes_the_fullest() -> None:
    fleet = fleet_of([0.0] * 3)
    fleet.num_sequences[1] = 5
    policy = make_policy("power_of_two")
    assert {chosen(policy, fleet) for _ in range(50)} == {0, 2}


def test_least_tokens_is_blind_to_prefixes() -> None:
    assert chosen(make_policy("least_tokens"), fleet_of([0.01, 0.0, 0.02], {2: 20}), 20) == 1


def test_the_threshold_takes_the_match_until_load_is_uneven() -> None:
    fleet = fleet_of([0.0, 0.0, 5.0], {2: 20})
    policy = make_policy("prefix_threshold")
    assert chosen(policy, fleet, 20) == 2
    fleet.num_sequences[2] = 11
    assert chosen(policy, fleet, 20) != 2


def test_pending_plus_miss_adds_what_waits_and_what_is_not_cached() -> None:
    policy = make_policy("pending_plus_miss")
    assert chosen(policy, fleet_of([0.0, 0.3], {1: 20}), 20) == 1
    assert chosen(policy, fleet_of([0.0, 0.4], {1: 20}), 20) == 0


def test_lmetric_multiplies_by_the_batch() -> None:
    fleet = fleet_of([0.0, 0.0], {1: 20})
    fleet.num_sequences[1] = 50
    assert chosen(make_policy("lmetric"), fleet, 40) == 0
    fleet.num_sequences[1] = 0
    assert chosen(make_policy("lmetric"), fleet, 40) == 1


def test_dynamos_cost_adds_running_tokens() -> None:
    fleet = fleet_of([0.0, 0.0], {1: 20})
    fleet.running_tokens[1] = 330
    assert chosen(make_policy("dynamo_linear"), fleet, 40) == 0
    fleet.running_tokens[1] = 310
    assert chosen(make_policy("dynamo_linear"), fleet, 40) == 1


@pytest.mark.parametrize("name", POLICIES)
def test_each_policy_says_what_is_cached_where_it_chose(name: str) -> None:
    fleet = fleet_of([0.1, 0.0, 0.2, 0.3], {0: 3, 2: 9})
    choice = make_policy(name).choose(request(9), fleet, everyone(fleet))
    assert choice.num_cached_blocks == {0: 3, 2: 9}.get(choice.slot, 0)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"policy 'best' is unknown; there are cheapest, .*round_robin"):
        make_policy("best")


def test_newcomers_are_taken_to_be_as_fast_as_their_peers() -> None:
    fleet = fleet_of([0.0, 0.0])
    newcomer = fleet.add("new", 16, LoadReport(num_blocks=100, num_free_blocks=100), 0.0)
    assert fleet.rates(newcomer) == (1000.0, 0.02, 1e-6)
    assert fleet.load_of(newcomer).prefill_tokens_per_s == 1000.0
    alone = Fleet()
    assert all(rate > 0 for rate in alone.rates(alone.add("a", 16, LoadReport(), 0.0)))
