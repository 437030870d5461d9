"""Chained hashes of full blocks: equal in every process, so that replicas and balancer agree on what is cached.

A block's hash covers all tokens up to its end and the chain's root, so two equal hashes mean equal prefixes. Keyed
BLAKE2b keeps 128 bits: a collision by chance or by craft is out of reach.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from engine.int32_buffer import Int32Array

HASH_BYTES = 16


def root_hash(model: str, adapter: str = "", salt: str = "") -> bytes:
    """The chain's start: sequences of other models, adapters or tenant salts never share a hash."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES, person=b"quire-kv-root")
    for part in (model, adapter, salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def hash_blocks(parent: bytes, token_ids: Int32Array, block_size: int) -> Iterator[bytes]:
    """Hash each full block of `token_ids` (int32, little-endian); `parent` is the hash of the block before them."""
    data = token_ids.astype("<i4", copy=False).tobytes()
    step = 4 * block_size
    for start in range(0, len(data) - step + 1, step):
        parent = hashlib.blake2b(data[start : start + step], digest_size=HASH_BYTES, key=parent).digest()
        yield parent
