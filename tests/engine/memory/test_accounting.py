from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.engine import LLMEngine
from engine.errors import RequestError
from engine.memory import KVCacheManager, MemoryUsage, ReservationPolicy, ReservingManager, run_size
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, SequenceGroup
from tests.engine.doubles import make_engine, make_request, run_to_end

KINDS = ("token_states", "reserved", "internal_fragmentation", "rounding", "external_fragmentation", "free")


def kinds(usage: MemoryUsage) -> dict[str, int]:
    return {kind: getattr(usage, kind) for kind in KINDS}


def slots_to_fill(engine: LLMEngine, group: SequenceGroup) -> int:
    max_tokens = group.sampling_params.max_tokens
    assert max_tokens is not None
    return min(group.seqs[0].num_prompt_tokens + max_tokens, engine.max_model_len) - 1


def count_paged(engine: LLMEngine, manager: KVCacheManager) -> dict[str, int]:
    """Slot by slot, with sets: no use of what blocks the managers say are free, full or shared."""
    size = manager.config.block_size
    held: set[int] = set()
    filled: set[tuple[int, int]] = set()
    will_fill: set[tuple[int, int]] = set()
    for group in engine._scheduler.running:
        for seq in group.live_seqs if group.is_forked else group.live_seqs[:1]:
            table = manager.block_table(seq).blocks.tolist()
            held.update(table)
            for position in range(min(len(table) * size, slots_to_fill(engine, group))):
                slot = table[position // size], position % size
                (filled if position < seq.num_computed_tokens else will_fill).add(slot)
    will_fill -= filled
    return {
        "token_states": len(filled),
        "reserved": len(will_fill),
        "internal_fragmentation": len(held) * size - len(filled) - len(will_fill),
        "rounding": 0,
        "external_fragmentation": 0,
        "free": (manager.config.num_blocks - len(held)) * size,
    }


def count_reserved(engine: LLMEngine, manager: ReservingManager) -> dict[str, int]:
    """Slot by slot over the runs that each group must hold, then over the blocks that are in none of them."""
    size, num_blocks = manager.config.block_size, manager.config.num_blocks
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    filled: set[int] = set()
    held: set[int] = set()
    for group in engine._scheduler.running:
        asked = reserved_tokens(engine, group)
        length = run_size(-(-asked // size)) * size
        starts = dict.fromkeys(manager.reservation(group).spare, 0)
        for seq in group.live_seqs:
            table = manager.block_table(seq).blocks.tolist()
            if table:
                starts[table[0]] = seq.num_computed_tokens
        for start, num_computed in starts.items():
            held.update(range(start, start + length // size))
            filled.update(range(start * size, start * size + num_computed))
            for offset in range(num_computed, length):
                beyond = "internal_fragmentation" if offset < asked else "rounding"
                counts["reserved" if offset < slots_to_fill(engine, group) else beyond] += 1
    counts["token_states"] = len(filled)
    waiting = engine._scheduler.waiting
    smallest = ReservationPolicy(manager.policy.name, engine.max_model_len).num_tokens(1, 1)
    wanted = run_size(-(-(reserved_tokens(engine, waiting[0]) if waiting else smallest) // size))
    for start in range(0, num_blocks, wanted):
        spot = range(start, min(start + wanted, num_blocks))
        usable = len(spot) == wanted and held.isdisjoint(spot)
        counts["free" if usable else "external_fragmentation"] += size * len(set(spot) - held)
    return dict(counts)


def reserved_tokens(engine: LLMEngine, group: SequenceGroup) -> int:
    bound = slots_to_fill(engine, group) + 1
    num_prompt = group.seqs[0].num_prompt_tokens
    power = 1
    while power < bound - num_prompt:
        power *= 2
    return {
        "orca_max": engine.max_model_len,
        "orca_pow2": min(num_prompt + power, engine.max_model_len),
        "orca_oracle": bound,
    }[engine.config.reservation]


def check(engine: LLMEngine) -> None:
    usage, manager = engine.memory_usage(), engine._kv_cache
    size = engine.config.block_size
    if isinstance(manager, KVCacheManager):
        assert kinds(usage) == count_paged(engine, manager)
    else:
        assert isinstance(manager, ReservingManager)
        assert kinds(usage) == count_reserved(engine, manager)
    assert sum(kinds(usage).values()) == usage.num_slots == engine.cache_config.num_blocks * size
    tables = [manager.block_table(seq).blocks.tolist() for seq in holders(engine)]
    assert usage.logical_blocks == sum(len(table) for table in tables)
    assert usage.physical_blocks == len({block for table in tables for block in table})
    assert usage.sharing >= 0


def holders(engine: LLMEngine) -> list[Sequence]:
    return [
        seq
        for group in engine._scheduler.running
        for seq in (group.live_seqs if group.is_forked else group.live_seqs[:1])
    ]


@pytest.mark.parametrize("reservation", ["paged", "orca_max", "orca_pow2", "orca_oracle"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_every_slot_is_accounted_for_at_every_step(reservation: str, data: st.DataObject) -> None:
    num_blocks, block_size = data.draw(st.integers(8, 40)), data.draw(st.sampled_from([1, 4, 16]))
    options: dict[str, Any] = {
        "reservation": reservation,
        "batching": data.draw(st.sampled_from(["static", "continuous"])),
    }
    if reservation == "paged":
        options["enable_prefix_caching"] = data.draw(st.booleans())
        options["num_swap_blocks"] = data.draw(st.sampled_from([0, 8]))
    engine, _ = make_engine(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_batched_tokens=data.draw(st.integers(3, 40)),
        max_model_len=max(2, num_blocks * block_size // 5),
        **options,
    )
    for step in range(data.draw(st.integers(4, 40))):
        if data.draw(st.integers(0, 2)) == 0:
            params = SamplingParams(
                n=data.draw(st.integers(1, 3)),
                max_tokens=data.draw(st.integers(1, 30)),
                ignore_eos=True,
                temperature=0.0,
                use_beam_search=data.draw(st.booleans()),
            )
            prompt = [data.draw(st.integers(0, 1))] * data.draw(st.integers(1, 40))
            try:
                engine.add_request(EngineRequest(str(step), prompt, params))
            except RequestError:
                continue
        if data.draw(st.integers(0, 15)) == 0:
            engine.abort(str(data.draw(st.integers(0, step))), index=data.draw(st.sampled_from([None, 0, 1])))
        engine.step()
        check(engine)


@pytest.mark.parametrize("reservation", ["paged", "orca_max", "orca_pow2", "orca_oracle"])
def test_what_is_reserved_is_what_will_be_filled(reservation: str) -> None:
    """Against the future: the last step before a request ends has filled all that was called reserved."""
    engine, _ = make_engine(num_blocks=64, max_model_len=128, reservation=reservation)
    engine.add_request(make_request("a", [1] * 21, max_tokens=30))
    seen = []
    while engine.has_unfinished_requests:
        engine.step()
        seen.append(engine.memory_usage())
    assert [usage.token_states for usage in seen] == [*range(21, 50), 0]
    assert seen[-2].reserved == 1, "the last step fills one more slot before the request ends"
    if reservation != "paged":
        assert {usage.token_states + usage.reserved for usage in seen[:-1]} == {50}
    assert kinds(seen[-1])["free"] == 256


def test_the_kinds_of_a_request_by_hand() -> None:
    """Prompt 10, output 5 of which the last never enters the cache; blocks of 4, after the first step."""
    expected = {
        # blocks held: 3; 12 slots, the request's 14 do not all lie in them yet
        "paged": (10, 2, 0, 0, 0, 256 - 12),
        # max_model_len 40: 10 blocks, a run of 16
        "orca_max": (10, 4, 26, 24, 0, 256 - 64),
        # 10 + 8 tokens: 5 blocks, a run of 8
        "orca_pow2": (10, 4, 4, 14, 0, 256 - 32),
        # 10 + 5 tokens: 4 blocks, a run of 4
        "orca_oracle": (10, 4, 1, 1, 0, 256 - 16),
    }
    for reservation, values in expected.items():
        engine, _ = make_engine(num_blocks=64, max_model_len=40, reservation=reservation)
        engine.add_request(make_request("a", [1] * 10, max_tokens=5))
        engine.step()
        assert tuple(kinds(engine.memory_usage()).values()) == values, reservation


def test_leftovers_of_a_pool_full_of_the_longest_runs_are_external_fragmentation() -> None:
    """Figure 2, Orca (Max): 15.7K slots hold seven runs of 2,048, and 8.9 % are left that nobody can use."""
    engine, _ = make_engine(num_blocks=983, block_size=16, max_model_len=2048, reservation="orca_max", max_num_seqs=64)
    for index in range(10):
        engine.add_request(make_request(str(index), [index] * 100, max_tokens=200))
    engine.step()
    usage = engine.memory_usage()
    assert engine.stats().num_running == 7
    assert usage.external_fragmentation == (983 - 7 * 128) * 16
    assert usage.free == 0
    assert usage.external_fragmentation / usage.num_slots == pytest.approx(0.089, abs=0.001)


def test_sharing_counts_what_separate_sequences_would_hold() -> None:
    engine, _ = make_engine(num_blocks=64, enable_prefix_caching=False)
    engine.add_request(make_request("a", [1] * 16, n=4, max_tokens=8))
    engine.step()
    engine.step()
    usage = engine.memory_usage()
    # Four blocks of prompt shared by four, and one of its own for each.
    assert (usage.logical_blocks, usage.physical_blocks, usage.sharing) == (20, 8, 12)
    assert usage.sharing_fraction == 12 / 20
    run_to_end(engine)
    assert engine.memory_usage().sharing_fraction == 0.0


def test_an_unknown_length_is_taken_to_be_its_limit() -> None:
    engine, _ = make_engine(num_blocks=64, max_model_len=64, reservation="orca_oracle")
    engine.add_request(make_request("a", [1] * 10, max_tokens=None, ignore_eos=False))
    engine.step()
    assert tuple(kinds(engine.memory_usage()).values()) == (10, 53, 1, 0, 0, 256 - 64)


def test_a_pinned_prefix_is_held_once_whoever_shares_it() -> None:
    engine, _ = make_engine(num_blocks=64, max_model_len=64, shared_prefixes={"system": list(range(8))})
    engine.pin_shared_prefixes()
    assert tuple(kinds(engine.memory_usage()).values()) == (8, 0, 0, 0, 0, 256 - 8)
    for index in range(3):
        engine.add_request(make_request(str(index), [*range(8), 100 + index], max_tokens=2))
    engine.step()
    usage = engine.memory_usage()
    assert usage.token_states == 8 + 3
    assert (usage.logical_blocks, usage.physical_blocks) == (9, 2 + 3)
    run_to_end(engine)
