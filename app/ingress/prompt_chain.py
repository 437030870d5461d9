"""A prompt's block hashes as the engine computes them: by them the balancer knows who has it cached."""

from __future__ import annotations

import numpy as np

from engine.memory import hash_blocks, root_hash
from engine.request import EngineRequest


def prompt_chain(request: EngineRequest, fingerprint: str, block_size: int) -> tuple[bytes, ...]:
    """Hashes of the blocks that could come from a cache: at least one token is always computed.

    Args:
        fingerprint: of the model; with the request's adapter and salt it is where the chain begins.
    """
    num_blocks = (len(request.prompt_token_ids) - 1) // block_size
    token_ids = np.asarray(request.prompt_token_ids[: num_blocks * block_size], dtype=np.int32)
    return tuple(hash_blocks(root_hash(fingerprint, request.adapter, request.cache_salt), token_ids, block_size))
