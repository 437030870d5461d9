from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig
from engine.memory import KVCacheManager, root_hash
from engine.sequence import Sequence


@settings(max_examples=60, deadline=None)
@given(prompts=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=30))
def test_events_add_up_to_what_can_be_found(prompts: list[tuple[int, int]]) -> None:
    manager = KVCacheManager(CacheConfig(block_size=4, num_blocks=12, enable_prefix_caching=True))
    events = manager.watch_blocks()
    assert events is not None
    known: set[bytes] = set()
    root = root_hash("model")
    for first, length in prompts:
        seq = Sequence([first] * length)
        manager.allocate(seq, root, length)
        seq.num_computed_tokens = length
        manager.cache_full_blocks(seq, root)
        manager.free(seq)
        changes = events.take()
        if changes is not None:
            known |= set(changes.stored)
            known -= set(changes.removed)
        cache = manager._pool.prefix_cache
        assert cache is not None
        assert known == set(cache._block_of)
        assert manager.num_empty_blocks == 12 - len(cache)
        manager.check_invariants()
    assert events.take() is None
    manager.reset_prefix_cache()
    changes = events.take()
    assert (set(changes.removed) if changes else set()) == known
    assert manager.num_empty_blocks == 12


def test_watching_tells_first_of_what_is_there_and_unwatched_caches_record_nothing() -> None:
    manager = KVCacheManager(CacheConfig(block_size=4, num_blocks=12, enable_prefix_caching=True))
    seq = Sequence(list(range(8)))
    root = root_hash("model")
    manager.allocate(seq, root, 8)
    seq.num_computed_tokens = 8
    manager.cache_full_blocks(seq, root)
    cache = manager._pool.prefix_cache
    assert cache is not None
    assert cache.events is None
    events = manager.watch_blocks()
    assert events is not None
    changes = events.take()
    assert changes is not None
    assert changes.stored == seq.block_hashes
    without = KVCacheManager(CacheConfig(block_size=4, num_blocks=12, enable_prefix_caching=False))
    assert without.watch_blocks() is None
