from __future__ import annotations

from benchmarks.routing.cache import BlockCache


def test_the_end_of_the_chain_used_longest_ago_goes_first() -> None:
    cache = BlockCache(3)
    assert cache.age_s(1.0) == 0.0
    assert cache.use([0, 1], 1.0) == (0, [1, 0], [])
    assert cache.use([0, 2, 3], 4.0) == (1, [3, 2], [1])
    assert len(cache) == 3
    assert cache.age_s(6.0) == 2.0
    assert cache.use([0, 2, 3], 7.0) == (3, [], [])


def test_a_chain_longer_than_the_cache_keeps_its_beginning() -> None:
    cache = BlockCache(2)
    assert cache.use([0, 1, 2], 0.0) == (0, [2, 1, 0], [2])
    assert cache.use([0, 1, 2], 0.0)[0] == 2
