"""A step's rows as arrays: filled in place from a SchedulerOutput, no Python loop over tokens."""

from __future__ import annotations

import numpy as np
import torch

from engine.kernels.backend import AttentionMetadata
from engine.scheduling import SchedulerOutput


class InputBatch:
    """Persistent host buffers for one step's inputs, and their view on the device.

    Args:
        max_tokens: rows that a step may have; max_seqs: sequences; max_blocks: blocks of one sequence.
    """

    def __init__(self, max_tokens: int, max_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._token_ids = np.zeros(max_tokens, dtype=np.int64)
        self._positions = np.zeros(max_tokens, dtype=np.int64)
        self._slots = np.zeros(max_tokens, dtype=np.int64)
        self._query_start_loc = np.zeros(max_seqs + 1, dtype=np.int32)
        self._seq_lens = np.zeros(max_seqs, dtype=np.int32)
        self._block_tables = np.zeros((max_seqs, max_blocks), dtype=np.int32)

    def fill(self, output: SchedulerOutput) -> tuple[torch.Tensor, AttentionMetadata]:
        """Token ids (int64 `[num_tokens]`) and attention metadata, valid until the next call."""
        scheduled = output.scheduled
        num_seqs = len(scheduled)
        counts = np.array([len(item.token_ids) for item in scheduled], dtype=np.int64)
        starts = np.array([item.start for item in scheduled], dtype=np.int64)
        ends = np.cumsum(counts)
        num_tokens = int(ends[-1])
        self._query_start_loc[1 : num_seqs + 1] = ends
        self._seq_lens[:num_seqs] = starts + counts
        np.concatenate([item.token_ids for item in scheduled], out=self._token_ids[:num_tokens])
        for row, item in enumerate(scheduled):
            self._block_tables[row, : len(item.block_table)] = item.block_table
        positions = self._positions[:num_tokens]
        positions[:] = np.arange(num_tokens) + np.repeat(starts - (ends - counts), counts)
        rows = np.repeat(np.arange(num_seqs), counts)
        blocks = self._block_tables[rows, positions // self._block_size].astype(np.int64)
        self._slots[:num_tokens] = blocks * self._block_size + positions % self._block_size

        max_blocks = max(len(item.block_table) for item in scheduled)
        metadata = AttentionMetadata(
            query_start_loc=self._to_device(self._query_start_loc[: num_seqs + 1]),
            seq_lens=self._to_device(self._seq_lens[:num_seqs]),
            block_tables=self._to_device(self._block_tables[:num_seqs, :max_blocks]),
            slot_mapping=self._to_device(self._slots[:num_tokens]),
            positions=self._to_device(positions),
            max_query_len=int(counts.max()),
            max_seq_len=int(self._seq_lens[:num_seqs].max()),
        )
        return self._to_device(self._token_ids[:num_tokens]), metadata

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)
