"""Named shared prefixes: computed once at the start, pinned for good, shared by all prompts that begin so (§4.4)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.execution.executor import Executor
from engine.memory import KVCache
from engine.scheduling import ScheduledSequence, SchedulerOutput
from engine.sequence import Sequence

if TYPE_CHECKING:
    from engine.tokenization import Tokenizer


def prefix_tokens(
    name: str,
    prefix: str | SequenceOf[int],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    block_size: int,
    max_model_len: int,
) -> list[int]:
    """A configured prefix's token ids.

    Raises:
        ConfigError: it is no text or tokens of this model, shorter than a block, or as long as `max_model_len`.
    """
    if isinstance(prefix, str):
        if tokenizer is None:
            raise ConfigError(f"shared_prefixes.{name}: this model has no tokenizer; give token ids")
        token_ids = tokenizer.encode(prefix)
    else:
        token_ids = list(prefix)
    if not all(isinstance(token, int) and 0 <= token < vocab_size for token in token_ids):
        raise ConfigError(f"shared_prefixes.{name}: a token id is outside the vocabulary")
    if not block_size <= len(token_ids) < max_model_len:
        raise ConfigError(
            f"shared_prefixes.{name}: {len(token_ids)} tokens; it must have from {block_size}, one block, to below "
            f"max_model_len={max_model_len}"
        )
    return token_ids


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
