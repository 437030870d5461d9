"""A step's rows as arrays: filled in place from a SchedulerOutput, no Python loop over tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from engine.execution.pinned import PinnedPair
from engine.kernels.backend import AttentionMetadata
from engine.scheduling import SchedulerOutput
from engine.sequence import PLACEHOLDER


class StepInputs(NamedTuple):
    """What the model computes in one step; valid until the next one but one is filled.

    Attributes:
        token_ids: int64 `[num_tokens]`.
        awaited_rows: rows whose token the step before draws; `awaited_seq_ids`, by which sequence it is known.
    """

    token_ids: torch.Tensor
    metadata: AttentionMetadata
    awaited_rows: list[int]
    awaited_seq_ids: list[int]


class InputBatch:
    """Persistent buffers for one step's inputs, on the host and on the device.

    Their addresses never change, so that a CUDA graph can be captured over them. A step may be filled while the one
    before it runs.

    Args:
        max_tokens: rows that a step may have; max_seqs: sequences; max_blocks: blocks of one sequence.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._token_ids = PinnedPair((max_tokens,), torch.int64, device)
        self._positions = PinnedPair((max_tokens,), torch.int64, device)
        self._slots = PinnedPair((max_tokens,), torch.int64, device)
        self._slots.on_device.fill_(-1)  # what is captured before a step has come writes nothing
        self._query_start_loc = PinnedPair((max_seqs + 1,), torch.int32, device)
        self._seq_lens = PinnedPair((max_seqs,), torch.int32, device)
        # Tables of a step, as wide as its longest, one after another: what is copied is no longer than it needs to be.
        self._block_tables = PinnedPair((max_seqs * max_blocks,), torch.int32, device)
        self._wide_tables = torch.zeros((max_seqs, max_blocks), dtype=torch.int32, device=device)

    def fill(self, output: SchedulerOutput) -> StepInputs:
        """A step of any shape."""
        return self._fill(output, num_padding=0)

    def fill_padded(self, output: SchedulerOutput, size: int) -> StepInputs:
        """A step in which each sequence computes one token, as the first rows of a batch of `size`.

        The rows behind them write no slot (-1) and see the first slot of block 0, whatever it holds; what comes out of
        them is for nobody. Shapes, strides and addresses depend on `size` alone, as a CUDA graph wants them.
        """
        assert output.num_tokens == len(output.scheduled) <= size
        filled = self._fill(output, num_padding=size - len(output.scheduled))
        width = filled.metadata.block_tables.shape[1]
        self._wide_tables[:size, :width].copy_(filled.metadata.block_tables)
        return filled._replace(metadata=self._padded_metadata(size))

    def _fill(self, output: SchedulerOutput, num_padding: int) -> StepInputs:
        scheduled = output.scheduled
        num_seqs = len(scheduled) + num_padding
        counts = np.ones(num_seqs, dtype=np.int64)
        starts = np.zeros(num_seqs, dtype=np.int64)
        counts[: len(scheduled)] = [len(item.token_ids) for item in scheduled]
        starts[: len(scheduled)] = [item.start for item in scheduled]
        ends = np.cumsum(counts)
        num_tokens, num_real = int(ends[-1]), int(ends[-1]) - num_padding
        width = max(len(item.block_table) for item in scheduled)
        token_ids, positions, slots = self._token_ids.next(), self._positions.next(), self._slots.next()
        query_start_loc, seq_lens = self._query_start_loc.next(), self._seq_lens.next()
        tables = self._block_tables.next()

        tokens = token_ids.host.numpy()[:num_tokens]
        np.concatenate([item.token_ids for item in scheduled], out=tokens[:num_real])
        tokens[num_real:] = 0
        awaited = np.flatnonzero(tokens == PLACEHOLDER)
        tokens[awaited] = 0  # until the device fills them in
        query_start_loc.host.numpy()[1 : num_seqs + 1] = ends
        seq_lens.host.numpy()[:num_seqs] = starts + counts
        rows_of_tables = tables.host.numpy()[: num_seqs * width].reshape(num_seqs, width)
        for row, item in enumerate(scheduled):
            rows_of_tables[row, : len(item.block_table)] = item.block_table
        rows_of_tables[len(scheduled) :] = 0
        row_positions = positions.host.numpy()[:num_tokens]
        row_positions[:] = np.arange(num_tokens) + np.repeat(starts - (ends - counts), counts)
        blocks = rows_of_tables[np.repeat(np.arange(num_seqs), counts), row_positions // self._block_size]
        row_slots = slots.host.numpy()[:num_tokens]
        row_slots[:] = blocks.astype(np.int64) * self._block_size + row_positions % self._block_size
        row_slots[num_real:] = -1

        metadata = AttentionMetadata(
            query_start_loc=query_start_loc.to_device(slice(num_seqs + 1)),
            seq_lens=seq_lens.to_device(slice(num_seqs)),
            block_tables=tables.to_device(slice(num_seqs * width)).view(num_seqs, width),
            slot_mapping=slots.to_device(slice(num_tokens)),
            positions=positions.to_device(slice(num_tokens)),
            max_query_len=int(counts.max()),
            max_seq_len=int((starts + counts).max()),
        )
        awaited_seq_ids = [scheduled[seq].seq_id for seq in np.searchsorted(ends, awaited, side="right").tolist()]
        return StepInputs(token_ids.to_device(slice(num_tokens)), metadata, awaited.tolist(), awaited_seq_ids)

    def padded(self, size: int) -> StepInputs:
        """What `fill_padded` fills for a batch of `size`, as it is: for a capture."""
        return StepInputs(self._token_ids.on_device[:size], self._padded_metadata(size), [], [])

    def _padded_metadata(self, size: int) -> AttentionMetadata:
        return AttentionMetadata(
            query_start_loc=self._query_start_loc.on_device[: size + 1],
            seq_lens=self._seq_lens.on_device[:size],
            block_tables=self._wide_tables[:size],
            slot_mapping=self._slots.on_device[:size],
            positions=self._positions.on_device[:size],
            max_query_len=1,
            # The longest that there can be: a replay takes whatever lengths the buffers hold.
            max_seq_len=self._max_blocks * self._block_size,
        )
