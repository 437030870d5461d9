from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from app.balancer.prefix_index import PrefixIndex, slots_of

# Chains through a small tree: a block's hash names its whole path.
paths = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def chain_of(path: list[int]) -> list[str]:
    return ["".join(map(str, path[: end + 1])) for end in range(len(path))]


def leading(chain: list[str], held: set[str]) -> int:
    return next((depth for depth, block in enumerate(chain) if block not in held), len(chain))


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 70), paths, st.integers(0, 9)), max_size=30),
    asked=paths,
    among=st.sets(st.integers(0, 70)),
)
def test_overlaps_are_what_each_replica_holds(
    steps: list[tuple[int, list[int], int]], asked: list[int], among: set[int]
) -> None:
    index = PrefixIndex()
    on_their_way = PrefixIndex()
    held: dict[int, set[str]] = {slot: set() for slot in range(71)}
    for slot, path, kept in steps:
        chain = chain_of(path)
        if kept == 9:
            on_their_way.store(slot, chain)
            held[slot] |= set(chain)
            continue
        index.store(slot, chain)
        held[slot] |= set(chain)
        # Replicas drop the end of a chain first, and with it whatever grew from it.
        gone = {block for block in held[slot] for end in chain[kept:] if block.startswith(end)}
        index.remove(slot, gone)
        on_their_way.remove(slot, gone)
        held[slot] -= gone
    chain = chain_of(asked)
    bitmap = sum(1 << slot for slot in among)
    found: dict[int, int] = {}
    depths = []
    for num_blocks, holders in index.overlaps(chain, bitmap, on_their_way):
        depths.append(num_blocks)
        for slot in slots_of(holders):
            assert slot not in found
            found[slot] = num_blocks
    assert depths == sorted(depths, reverse=True)
    assert found == {slot: depth for slot in among if (depth := leading(chain, held[slot])) > 0}


def test_dropping_a_replica_leaves_nothing_of_it() -> None:
    index = PrefixIndex()
    index.store(0, ["a", "b"])
    index.store(3, ["a"])
    index.drop(0)
    assert index.holders("a") == 1 << 3
    assert index.holders("b") == 0
    assert len(index) == 1
    index.drop(3)
    assert len(index) == 0


def test_replacing_keeps_what_is_in_both() -> None:
    index = PrefixIndex()
    index.store(1, ["a", "b"])
    index.replace(1, ["b", "c"])
    assert index.held(1) == {"b", "c"}
    assert (index.holders("a"), index.holders("b"), index.holders("c")) == (0, 2, 2)


def test_removing_what_is_not_held_is_no_error() -> None:
    index = PrefixIndex()
    index.store(1, ["a"])
    index.remove(2, ["a", "b"])
    assert index.holders("a") == 2


def test_slots_of_reads_all_bits() -> None:
    slots = [0, 1, 63, 64, 65, 127, 128, 4000]
    assert slots_of(sum(1 << slot for slot in slots)) == slots
    assert slots_of(0) == []
