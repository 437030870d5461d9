"""A copy of one whole block: what managers of KV memory ask of the device."""

from __future__ import annotations

from typing import NamedTuple


class BlockCopy(NamedTuple):
    """Copy a whole block before this step's writes: copy-on-write within the pool, or a swap to or from the host."""

    source: int
    destination: int
