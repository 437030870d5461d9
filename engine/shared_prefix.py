"""Named shared prefixes: computed once at the start, pinned for good, shared by all prompts that begin so (§4.4)."""

from __future__ import annotations

from engine.execution.executor import Executor
from engine.memory import KVCache
from engine.scheduling import ScheduledSequence, SchedulerOutput
from engine.sequence import Sequence


def pin_prefix(
    executor: Executor, kv_cache: KVCache, token_ids: list[int], root_hash: bytes, block_size: int, chunk: int
) -> Sequence:
    """Compute a prefix's full blocks and keep them on the device.

    What does not fill a last block is left to the requests: they compute it together with what follows it.

    Args:
        token_ids: at least `block_size` of them; the pool has room.
        chunk: tokens a step.
    """
    seq = Sequence(token_ids[: len(token_ids) // block_size * block_size])
    kv_cache.allocate(seq, root_hash, seq.num_tokens)
    while seq.num_computed_tokens < seq.num_tokens:
        start = seq.num_computed_tokens
        tokens = seq.token_ids[start : start + chunk]
        executor.execute(
            SchedulerOutput((ScheduledSequence(seq.seq_id, start, tokens, kv_cache.block_table(seq).blocks, ()),))
        )
        seq.num_computed_tokens += len(tokens)
        kv_cache.cache_full_blocks(seq, root_hash)
    kv_cache.pin(seq)
    return seq
