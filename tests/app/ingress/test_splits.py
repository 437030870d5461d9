"""Weighted splits: exact shares, evenly spread."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from app.ingress.splits import WeightedSplit


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"a": 1, "b": 1}, {"a": 500, "b": 500}),
        ({"a": 9, "b": 1}, {"a": 900, "b": 100}),
        ({"a": 0.95, "b": 0.05}, {"a": 950, "b": 50}),
        ({"a": 5, "b": 3, "c": 2}, {"a": 500, "b": 300, "c": 200}),
        ({"a": 7}, {"a": 1000}),
    ],
)
def test_shares_are_exact_over_a_thousand(weights: dict[str, float], expected: dict[str, int]) -> None:
    split = WeightedSplit(weights)
    assert Counter(split.next() for _ in range(1000)) == expected


def test_a_small_share_is_spread_evenly() -> None:
    split = WeightedSplit({"a": 9, "b": 1})
    turns = [number for number in range(100) if split.next() == "b"]
    assert [later - earlier for earlier, later in itertools.pairwise(turns)] == [10] * 9


def test_at_any_moment_each_target_is_within_one_request_of_its_share() -> None:
    weights = {"a": 0.61, "b": 0.29, "c": 0.1}
    split = WeightedSplit(weights)
    seen: Counter[str] = Counter()
    for number in range(1, 500):
        seen[split.next()] += 1
        for target, weight in weights.items():
            assert abs(seen[target] - number * weight) < 1.0, (number, target)
