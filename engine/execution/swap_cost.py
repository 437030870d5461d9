"""Measures what moving blocks to the host and back costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.memory import BlockCopy
from engine.preemption import SwapCost

Swap = Callable[[Sequence[BlockCopy]], None]


def measure_swap_cost(swap_out: Swap, swap_in: Swap, num_blocks: int, block_bytes: int) -> SwapCost:
    """Time a few block copies each way.

    Args:
        num_blocks: that both pools have at least.
    """
    count = min(8, num_blocks)
    copies = [BlockCopy(block, block) for block in range(count)]
    rates = []
    for swap in (swap_out, swap_in):
        swap(copies)  # the first one pays for touching the memory
        began = time.perf_counter()
        swap(copies)
        rates.append(count * block_bytes / (time.perf_counter() - began))
    return SwapCost(block_bytes, *rates)
