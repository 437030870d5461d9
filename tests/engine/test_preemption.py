"""Swap or recompute: what either costs, and which is cheaper for a group."""

from __future__ import annotations

import pytest
import torch

from engine.config import CacheConfig, Preemption
from engine.execution.cache_engine import CacheEngine
from engine.kernels.reference import ReferenceBackend
from engine.memory import BlockCopy, KVCacheManager, root_hash
from engine.preemption import PreemptionPolicy, SwapCost
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceGroup
from tests.engine.doubles import MODEL

ROOT = root_hash("test")
BLOCK_SIZE = 4
COST = SwapCost(block_bytes=1000, out_bytes_per_s=1e4, in_bytes_per_s=2e4)  # 0.1 s a block out, 0.05 s in


def make_cache(*, num_swap_blocks: int = 64, prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(CacheConfig(BLOCK_SIZE, 64, prefix_caching, num_swap_blocks))


def make_policy(cache: KVCacheManager, mode: Preemption = "auto", cost: SwapCost | None = COST) -> PreemptionPolicy:
    """A policy that has learnt that a token takes 10 ms."""
    policy = PreemptionPolicy(mode, cache, cache.config, lambda: cost)
    for num_tokens in (10, 100) * 20:
        policy.compute_cost.observe(num_tokens, 1000, 0.01 * num_tokens)
    return policy


def computed_group(cache: KVCacheManager, request_id: str, prompts: list[list[int]]) -> SequenceGroup:
    """A group all of whose tokens are computed; its sequences share the blocks that they have in common."""
    seqs = [Sequence(prompt, index) for index, prompt in enumerate(prompts)]
    group = SequenceGroup(request_id, seqs, SamplingParams(n=len(seqs)), 0, ROOT, 0.0)
    trunk = seqs[0]
    cache.allocate(trunk, ROOT, group.fork_point)
    trunk.num_computed_tokens = group.fork_point
    cache.cache_full_blocks(trunk, ROOT)
    for child in seqs[1:]:
        cache.fork(trunk, child)
    group.is_forked = True
    for seq in seqs:
        if (num_new := seq.num_tokens - group.fork_point) > 0:
            cache.append(seq, num_new)
            seq.num_computed_tokens = seq.num_tokens
    return group


def test_a_group_alone_is_computed_and_moved_whole() -> None:
    cache = make_cache()
    group = computed_group(cache, "a", [list(range(40))])
    policy = make_policy(cache)
    assert policy.recompute_seconds(group) == pytest.approx(40 * 0.01, rel=0.01)
    assert policy.swap_seconds(group) == pytest.approx(10 * (0.1 + 0.05), rel=0.01)


def test_blocks_that_other_groups_hold_are_neither_computed_nor_brought_in() -> None:
    cache = make_cache()
    computed_group(cache, "other", [list(range(24))])
    group = computed_group(cache, "a", [list(range(40))])  # 6 of its 10 blocks are the other's
    policy = make_policy(cache)
    assert policy.recompute_seconds(group) == pytest.approx((40 - 24) * 0.01, rel=0.01)
    assert policy.swap_seconds(group) == pytest.approx(10 * 0.1 + 4 * 0.05, rel=0.01)


def test_a_forked_group_counts_its_trunk_once() -> None:
    cache = make_cache()
    trunk = list(range(16))
    group = computed_group(cache, "a", [[*trunk, 100 + i, 1, 2, 3, 4, 5, 6, 7] for i in range(3)])
    policy = make_policy(cache)
    assert policy.recompute_seconds(group) == pytest.approx((16 + 3 * 8) * 0.01, rel=0.01)
    assert policy.swap_seconds(group) == pytest.approx((4 + 3 * 2) * (0.1 + 0.05), rel=0.01)


@pytest.mark.parametrize("swapped", [True, False])
def test_the_share_that_came_back_cached_makes_both_ways_cheaper(swapped: bool) -> None:
    cache = make_cache()
    group = computed_group(cache, "a", [list(range(40))])
    policy = make_policy(cache)
    for _ in range(500):
        policy.observe_preemption(group, swapped)
        come_back(policy, group, swapped, num_found=7)  # of 10 blocks
    assert policy.recompute_seconds(group) == pytest.approx(0.3 * 40 * 0.01, rel=0.02)
    assert policy.swap_seconds(group) == pytest.approx(10 * 0.1 + 0.3 * 10 * 0.05, rel=0.02)


def come_back(policy: PreemptionPolicy, group: SequenceGroup, swapped: bool, num_found: int) -> None:
    assert group.preempted_blocks is not None
    if swapped:
        policy.observe_swap_in(group, group.preempted_blocks.num_blocks - num_found)
    else:
        policy.observe_recomputation(group, num_found * BLOCK_SIZE)


@pytest.mark.parametrize("swapped", [True, False])
def test_what_others_hold_does_not_count_as_having_come_back(swapped: bool) -> None:
    cache = make_cache()
    computed_group(cache, "other", [list(range(24))])
    group = computed_group(cache, "a", [list(range(40))])
    policy = make_policy(cache)
    for _ in range(500):
        policy.observe_preemption(group, swapped)
        come_back(policy, group, swapped, num_found=6)  # only the other group's
    assert policy.recompute_seconds(group) == pytest.approx((40 - 24) * 0.01, rel=0.02)
    for _ in range(500):
        policy.observe_preemption(group, swapped)
        come_back(policy, group, swapped, num_found=8)  # and now half of the rest
    assert policy.recompute_seconds(group) == pytest.approx((40 - 32) * 0.01, rel=0.02)


def test_before_any_group_has_come_back_nothing_is_expected_to_be_found() -> None:
    """As many as fit the pool can be preempted before the first returns: what is only supposed decides for all."""
    cache = make_cache()
    group = computed_group(cache, "a", [list(range(40))])
    policy = make_policy(cache)
    for _ in range(100):
        policy.observe_preemption(group, swapped=False)
    assert policy.recompute_seconds(group) == pytest.approx(40 * 0.01, rel=0.01)


def test_what_a_group_had_not_computed_says_nothing_of_the_cache() -> None:
    cache = make_cache()
    seq = Sequence(list(range(80)))
    group = SequenceGroup("a", [seq], SamplingParams(), 0, ROOT, 0.0)
    cache.allocate(seq, ROOT, 40)
    seq.num_computed_tokens = 40
    policy = make_policy(cache)
    for _ in range(500):
        policy.observe_preemption(group, swapped=False)
        policy.observe_recomputation(group, 40)
    assert policy.recompute_seconds(group) == pytest.approx(0.0, abs=0.01), "all that it had was found"


def test_without_a_prefix_cache_nothing_comes_back() -> None:
    cache = make_cache(prefix_caching=False)
    group = computed_group(cache, "a", [list(range(40))])
    policy = PreemptionPolicy("auto", cache, cache.config, lambda: COST)
    policy.compute_cost.observe(100, 1000, 1.0)
    assert policy.recompute_seconds(group) == pytest.approx(0.4)
    assert policy.swap_seconds(group) == pytest.approx(10 * (0.1 + 0.05))


def test_auto_takes_the_cheaper_way() -> None:
    cache = make_cache()
    group = computed_group(cache, "a", [list(range(40))])
    assert not make_policy(cache).prefers_swap(group)  # 1.5 s against 0.4 s
    assert make_policy(cache, cost=SwapCost(1000, 1e5, 1e5)).prefers_swap(group)  # 0.2 s


def test_a_named_way_is_taken_whatever_it_costs() -> None:
    cache = make_cache()
    group = computed_group(cache, "a", [list(range(40))])
    assert make_policy(cache, "swap", SwapCost(1000, 1.0, 1.0)).prefers_swap(group)
    assert not make_policy(cache, "recompute", SwapCost(1000, 1e12, 1e12)).prefers_swap(group)


@pytest.mark.parametrize("mode", ["swap", "auto"])
def test_without_a_swap_pool_all_is_recomputed(mode: Preemption) -> None:
    cache = make_cache(num_swap_blocks=0)
    group = computed_group(cache, "a", [list(range(40))])
    assert not make_policy(cache, mode, cost=None).prefers_swap(group)


# CacheEngine: the copies themselves


def make_cache_engine(device: str, num_blocks: int = 12, num_swap_blocks: int = 9) -> CacheEngine:
    config = CacheConfig(BLOCK_SIZE, num_blocks, False, num_swap_blocks)
    return CacheEngine(MODEL, config, torch.float32, torch.device(device), ReferenceBackend())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_swapped_blocks_come_back_byte_for_byte_wherever_they_go(device: str) -> None:
    engine = make_cache_engine(device)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, engine.kv_pool.shape, generator=generator).to(torch.int32)
    engine.kv_pool.copy_(bits.view(torch.float32))  # any bits, NaN among them
    taken, hosts, back = [3, 0, 11, 7, 5], [8, 2, 0, 6, 3], [7, 3, 5, 0, 11]
    engine.swap_out([BlockCopy(*pair) for pair in zip(taken, hosts, strict=True)])
    assert torch.equal(engine.swap_pool[hosts].view(torch.int32), bits[taken])
    engine.kv_pool[taken] = float("nan")
    engine.swap_in([BlockCopy(*pair) for pair in zip(hosts, back, strict=True)])
    result = engine.kv_pool.cpu().view(torch.int32)
    assert torch.equal(result[back], bits[taken])
    others = [block for block in range(12) if block not in taken]
    assert torch.equal(result[others], bits[others])


@pytest.mark.parametrize("device", DEVICES)
def test_the_swap_cost_is_measured(device: str) -> None:
    engine = make_cache_engine(device)
    cost = engine.measure_swap_cost()
    assert cost.block_bytes == CacheEngine.block_bytes(MODEL, BLOCK_SIZE, torch.float32) == 2 * 4 * 8 * 4
    assert 0.0 < cost.out_bytes_per_s < 1e13
    assert 0.0 < cost.in_bytes_per_s < 1e13
