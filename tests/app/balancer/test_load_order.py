from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.balancer.load_order import LoadOrder


@given(st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), st.floats(0, 5))), max_size=60), st.floats(-1, 6))
def test_it_stays_sorted_as_slots_move(moves: list[tuple[int, float | None]], asked: float) -> None:
    order = LoadOrder()
    expected: dict[int, float] = {}
    for slot, free_at in moves:
        if free_at is not None:
            order.put(slot, free_at)
            expected[slot] = free_at
        elif slot in expected:
            order.remove(slot)
            del expected[slot]
    assert list(order) == sorted((free_at, slot) for slot, free_at in expected.items())
    assert len(order) == len(expected)
    later = [free_at for free_at in expected.values() if free_at > asked]
    assert order.first_after(asked) == (min(later) if later else None)
