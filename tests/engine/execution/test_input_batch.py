"""A step's inputs, and decoding steps padded for graphs."""

from __future__ import annotations

import numpy as np
import torch

from engine.execution.decode_graphs import DecodeGraphs, capture_sizes
from engine.execution.input_batch import InputBatch, StepInputs
from engine.scheduling import ScheduledSequence, SchedulerOutput
from engine.sequence import PLACEHOLDER

BLOCK_SIZE, MAX_BLOCKS = 4, 6


def scheduled(seq_id: int, start: int, tokens: list[int], blocks: list[int]) -> ScheduledSequence:
    return ScheduledSequence(seq_id, start, np.array(tokens, np.int32), np.array(blocks, np.int32), ())


def step(*items: ScheduledSequence) -> SchedulerOutput:
    return SchedulerOutput(items)


def make_inputs() -> InputBatch:
    return InputBatch(32, 8, MAX_BLOCKS, BLOCK_SIZE, torch.device("cpu"))


DECODES = step(
    scheduled(7, 5, [50], [3, 1]), scheduled(8, 0, [PLACEHOLDER], [2]), scheduled(9, 11, [PLACEHOLDER], [4, 5, 0])
)


def test_rows_of_prompts_and_decodes() -> None:
    inputs = make_inputs().fill(step(scheduled(1, 2, [20, 21, 22], [5, 9]), scheduled(2, 8, [30], [1, 2, 3])))
    metadata = inputs.metadata
    assert inputs.token_ids.tolist() == [20, 21, 22, 30]
    assert metadata.positions.tolist() == [2, 3, 4, 8]
    assert metadata.slot_mapping.tolist() == [22, 23, 36, 12]
    assert metadata.query_start_loc.tolist() == [0, 3, 4]
    assert metadata.seq_lens.tolist() == [5, 9]
    assert metadata.block_tables[0, :2].tolist() == [5, 9]
    assert metadata.block_tables[1].tolist() == [1, 2, 3]
    assert (metadata.max_query_len, metadata.max_seq_len) == (3, 9)
    assert inputs.awaited_rows == []


def test_awaited_tokens_are_named_by_row_and_sequence() -> None:
    inputs = make_inputs().fill(
        step(scheduled(1, 0, [4, 5, 6], [0]), scheduled(2, 3, [PLACEHOLDER], [1]), scheduled(3, 2, [PLACEHOLDER], [2]))
    )
    assert inputs.token_ids.tolist() == [4, 5, 6, 0, 0]
    assert (inputs.awaited_rows, inputs.awaited_seq_ids) == ([3, 4], [2, 3])


def test_padding_rows_write_nothing_and_read_one_slot() -> None:
    batch = make_inputs()
    batch.fill(step(scheduled(1, 0, [99] * 20, [7, 7, 7, 7, 7])))  # what an earlier step leaves behind
    inputs = batch.fill_padded(DECODES, 5)
    metadata = inputs.metadata
    assert inputs.token_ids.tolist() == [50, 0, 0, 0, 0]
    assert metadata.slot_mapping.tolist() == [5, 8, 3, -1, -1]
    assert metadata.positions.tolist() == [5, 0, 11, 0, 0]
    assert metadata.query_start_loc.tolist() == [0, 1, 2, 3, 4, 5]
    assert metadata.seq_lens.tolist() == [6, 1, 12, 1, 1]
    assert metadata.block_tables.shape == (5, MAX_BLOCKS)
    assert metadata.block_tables[2, :3].tolist() == [4, 5, 0]
    assert metadata.block_tables[3:, 0].tolist() == [0, 0]
    assert (metadata.max_query_len, metadata.max_seq_len) == (1, MAX_BLOCKS * BLOCK_SIZE)
    assert (inputs.awaited_rows, inputs.awaited_seq_ids) == ([1, 2], [8, 9])


def test_a_padded_batch_lies_where_it_was_captured() -> None:
    batch = make_inputs()
    captured = batch.padded(5)
    filled = batch.fill_padded(DECODES, 5)
    again = batch.fill_padded(step(scheduled(1, 4, [1], [0, 1])), 5)
    for inputs in (filled, again):
        assert inputs.token_ids.data_ptr() == captured.token_ids.data_ptr()
        for mine, theirs in zip(inputs.metadata, captured.metadata, strict=True):
            if isinstance(mine, torch.Tensor):
                assert isinstance(theirs, torch.Tensor)
                assert (mine.data_ptr(), mine.shape, mine.stride()) == (
                    theirs.data_ptr(),
                    theirs.shape,
                    theirs.stride(),
                )
            else:
                assert mine == theirs


def test_what_is_captured_before_any_step_writes_nothing() -> None:
    assert make_inputs().padded(8).metadata.slot_mapping.tolist() == [-1] * 8


def test_capture_sizes_end_with_the_largest_batch() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(21) == [1, 2, 4, 8, 16, 21]
    assert capture_sizes(300)[-4:] == [256, 272, 288, 300]
    assert capture_sizes(4096)[-1] == 512


class FakeGraph:
    """Computes again what it was captured over."""

    def __init__(self, run: object) -> None:
        self.run = run

    def replay(self) -> torch.Tensor:
        return self.run()  # type: ignore[operator, no-any-return]


def test_a_decode_takes_the_smallest_graph_that_holds_it() -> None:
    batch = make_inputs()
    sizes: list[int] = []

    def compute(inputs: StepInputs) -> torch.Tensor:
        sizes.append(len(inputs.token_ids))
        return inputs.token_ids * 10 + inputs.metadata.positions

    graphs = DecodeGraphs(batch, [1, 2, 4, 8], compute, FakeGraph)
    assert graphs.size_for(DECODES) == 4
    assert graphs.size_for(step(DECODES.scheduled[0])) == 1
    assert graphs.size_for(step(*DECODES.scheduled * 2)) == 8
    assert graphs.size_for(step(*DECODES.scheduled * 3)) is None, "more sequences than any graph has"
    assert graphs.size_for(step(DECODES.scheduled[0], scheduled(1, 0, [1, 2], [0]))) is None, "a prompt's chunk"
    assert graphs.size_for(step()) is None

    def feed(inputs: StepInputs) -> None:
        for row, seq_id in zip(inputs.awaited_rows, inputs.awaited_seq_ids, strict=True):
            inputs.token_ids[row] = seq_id

    assert graphs.run(DECODES, 4, feed)[:3].tolist() == [505, 80, 101]
    assert sizes == [4]
