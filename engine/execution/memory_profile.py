"""What a step takes beside weights and KV pool: the memory that a GPU must keep free for activations (§4.1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput


def largest_steps(max_tokens: int, max_seqs: int, max_len: int, block_size: int) -> list[SchedulerOutput]:
    """The steps that take the most memory: one with as many rows as there may be, one with as many that draw.

    All sequences name the same first blocks of the pool, whose content means nothing.

    Args:
        max_len: of one sequence.
    """
    num_drawing = min(max_seqs, max_tokens)
    num_long = min(num_drawing, -(-max_tokens // max_len))
    num_rows = min(max_tokens, num_long * max_len)
    return [_step(num_rows, num_long, block_size), _step(num_drawing, num_drawing, block_size)]


def _step(num_tokens: int, num_seqs: int, block_size: int) -> SchedulerOutput:
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1)
    tokens = np.zeros(num_tokens // num_seqs, dtype=np.int32)
    table = np.arange(-(-len(tokens) // block_size), dtype=np.int32)
    return SchedulerOutput(
        tuple(
            ScheduledSequence(
                seq_id, 0, tokens, table,
                (SampleRequest(seq_id, str(seq_id), params, 0, 0, len(tokens), len(tokens), tokens, 0.0),),
            )
            for seq_id in range(num_seqs)
        )
    )  # fmt: skip


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Device memory that `run` allocates at its peak, beside what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
