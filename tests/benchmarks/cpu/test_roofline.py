"""The work of a step, counted by brute force, and the least time for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.cpu.machine import MachineRates
from benchmarks.cpu.roofline import (
    Sizes,
    floor_seconds,
    gemm_weights,
    head_weights,
    multiplied_in,
    step_work,
)
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig
from engine.sampling_params import SamplingParams
from engine.scheduling import SampleRequest, ScheduledSequence, SchedulerOutput

NONE = np.zeros(0, dtype=np.int32)
SAMPLE = SampleRequest(0, "r", SamplingParams(), 0, 0, 1, 1, NONE, 0.0)


def scheduled(*spans: tuple[int, int]) -> SchedulerOutput:
    """Sequences with tokens from `start` to `end`, of which each last row is sampled."""
    return SchedulerOutput(
        tuple(
            ScheduledSequence(index, start, np.zeros(end - start, dtype=np.int32), NONE, (SAMPLE,))
            for index, (start, end) in enumerate(spans)
        )
    )


@pytest.fixture
def model() -> ModelConfig:
    return open_checkpoint("dummy:tiny").model_config()


def test_weights_are_all_matrices(model: ModelConfig) -> None:
    tied = dataclasses.replace(model, tie_word_embeddings=True)
    norms = (2 * tied.num_layers + 1) * tied.hidden_size
    assert gemm_weights(tied) + head_weights(tied) == tied.num_parameters - norms


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_attention_reads_each_visible_token_once(model: ModelConfig, window: int | None) -> None:
    model = dataclasses.replace(model, layer_windows=(window, *[None] * (model.num_layers - 1)))
    spans = [(0, 1), (0, 12), (5, 6), (20, 33), (60, 61)]
    read = pairs = 0
    for layer in range(model.num_layers):
        reach = model.window(layer) or 10**6
        for start, end in spans:
            visible = [{*range(max(0, row - reach + 1), row + 1)} for row in range(start, end)]
            read += len(set.union(*visible))
            pairs += sum(map(len, visible))
    sizes = Sizes({"gemm": gemm_weights(model), "head": head_weights(model)}, kv_bytes_per_token=model.num_layers * 96)
    work = step_work(model, sizes, scheduled(*spans))["attention"]
    assert work.num_bytes == 96 * read
    assert work.operations == 4 * model.num_heads * model.head_dim * pairs


def test_a_step_takes_what_its_phases_do(model: ModelConfig) -> None:
    gemm, head = gemm_weights(model), head_weights(model)
    sizes = Sizes({"gemm": gemm * 5 // 8, "head": 2 * head}, kv_bytes_per_token=model.num_layers)
    machine = MachineRates(1, 1.0, {"float32": 4.0, "int8": 16.0})
    floor = floor_seconds(model, sizes, [scheduled((9, 10)), scheduled((9, 10), (0, 31))], machine)
    # One row is bound by the weights' bytes, 32 rows by their products; the head has no bfloat16 products here.
    assert floor["gemm"] == pytest.approx(gemm * 5 // 8 + 2 * gemm * 32 / 16)
    assert floor["head"] == pytest.approx(2 * head + 2 * head)


def test_a_step_that_samples_nothing_reads_no_head(model: ModelConfig) -> None:
    sizes = Sizes({"gemm": 1, "head": 1}, 1.0)
    output = scheduled((0, 5))
    chunk = dataclasses.replace(output, scheduled=(output.scheduled[0]._replace(samples=()),))
    assert set(step_work(model, sizes, chunk)) == {"gemm", "attention"}


def test_types_follow_from_bytes() -> None:
    assert [multiplied_in(size) for size in (4.0, 2.0, 2.06, 1.06, 0.625)] == [
        "float32",
        "bfloat16",
        "bfloat16",
        "int8",
        "int8",
    ]
