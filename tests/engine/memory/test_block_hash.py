from __future__ import annotations

import subprocess
import sys

import numpy as np

from engine.memory.block_hash import HASH_BYTES, hash_blocks, root_hash


def chain(tokens: list[int], root: bytes, block_size: int = 4) -> list[bytes]:
    return list(hash_blocks(root, np.array(tokens, dtype=np.int32), block_size))


def test_only_full_blocks_are_hashed_and_each_covers_its_prefix() -> None:
    root = root_hash("model")
    hashes = chain(list(range(10)), root)
    assert len(hashes) == 2
    assert all(len(item) == HASH_BYTES for item in hashes)
    assert chain([9, *range(1, 8)], root)[1] != hashes[1], "a change in block 0 must show in block 1"
    assert chain(list(range(4, 8)), hashes[0]) == [hashes[1]], "a chain can be continued"


def test_models_adapters_and_salts_never_share() -> None:
    roots = {root_hash("a"), root_hash("b"), root_hash("a", "x"), root_hash("a", "", "x"), root_hash("ax")}
    assert len(roots) == 5


def test_hashes_agree_between_processes() -> None:
    code = "from engine.memory import root_hash; print(root_hash('model', 'adapter', 'salt').hex())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == root_hash("model", "adapter", "salt").hex()
