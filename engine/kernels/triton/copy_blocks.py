"""Whole blocks copied within the pool (§4.3), in order, in one launch: a program has one stretch of every block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORD_TYPES = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
_WORDS = 512


@triton.jit(do_not_specialize=["num_pairs"])
def copy_blocks_kernel(
    pool: tl.tensor, pairs: tl.tensor, num_pairs: tl.tensor, words_a_block: tl.tensor, WORDS: tl.constexpr
):
    words = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = words < words_a_block
    for pair in range(num_pairs):
        source, destination = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
        copied = tl.load(pool + source * words_a_block + words, mask=inside)
        # A thread may store what another one has loaded, or will load for the next pair of a chain.
        tl.debug_barrier()
        tl.store(pool + destination * words_a_block + words, copied, mask=inside)
        tl.debug_barrier()


def launch_copy_blocks(kv_pool: torch.Tensor, pairs: torch.Tensor) -> None:
    """A block is copied in the widest words that it consists of."""
    block_bytes = kv_pool.stride(0) * kv_pool.element_size()
    if not len(pairs) or not block_bytes:
        return
    aligned_to = block_bytes | kv_pool.data_ptr()
    word = next(size for size in _WORD_TYPES if aligned_to % size == 0)
    words = kv_pool.view(len(kv_pool), -1).view(torch.uint8).view(_WORD_TYPES[word])
    copy_blocks_kernel[(-(-words.shape[1] // _WORDS),)](words, pairs, len(pairs), words.shape[1], WORDS=_WORDS)
