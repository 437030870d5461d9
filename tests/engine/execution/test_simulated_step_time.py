"""The step-time model against sums done by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from engine.errors import ConfigError
from engine.execution.hardware import HARDWARE, Hardware, find_hardware
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_position_embeddings=64,
)
HEAD = 100 * 8
LAYERS = MODEL.num_parameters - 2 * HEAD
# All rates are so high that the one under test is the only price.
FREE = Hardware("free", "test", 1, 1e9, 1e30, 1e30, 1e30, 1e30, 1e30)


def seconds(work: StepWork, num_devices: int = 1, **prices: float) -> float:
    hardware = dataclasses.replace(FREE, num_devices=num_devices, **prices)  # type: ignore[arg-type]
    return StepTimeModel(MODEL, hardware, block_size=16).seconds(work)


DECODE = StepWork(num_seqs=3, num_tokens=3, num_samples=3, num_kv_tokens=50, num_pairs=50)


def test_weights_are_read_once_a_step() -> None:
    assert seconds(DECODE, memory_bandwidth=10.0) == pytest.approx((LAYERS + HEAD) * 2 / 10.0)


def test_every_row_goes_through_the_layers_and_only_samples_through_the_head() -> None:
    prompt = StepWork(num_seqs=1, num_tokens=20, num_samples=1, num_kv_tokens=20, num_pairs=210)
    assert seconds(prompt, matrix_flops=5.0) == pytest.approx((20 * 2 * LAYERS + 2 * HEAD) / 5.0)


def test_attention_reads_keys_and_values_of_all_layers() -> None:
    assert seconds(DECODE, kv_bandwidth=4.0) == pytest.approx(50 * (2 * 2 * 1 * 4 * 2) / 4.0)


def test_attention_multiplies_every_pair_twice_in_every_head_and_layer() -> None:
    assert seconds(DECODE, attention_flops=4.0) == pytest.approx(50 * 2 * (2 * 2) * (2 * 4) / 4.0)


def test_the_slower_of_memory_and_arithmetic_counts() -> None:
    both = seconds(DECODE, memory_bandwidth=10.0, matrix_flops=1.0)
    assert both == pytest.approx(max(seconds(DECODE, memory_bandwidth=10.0), seconds(DECODE, matrix_flops=1.0)))


def test_fixed_costs_add_up() -> None:
    assert seconds(DECODE, step_s=2.0, sequence_s=0.5) == pytest.approx(3.5)


def test_devices_share_the_work_and_pay_for_all_reduces() -> None:
    assert seconds(DECODE, 4, memory_bandwidth=10.0) == pytest.approx(seconds(DECODE, memory_bandwidth=10.0) / 4)
    # Two all-reduces a layer; a ring of 4 moves 2 * 3/4 of [3 rows, 8] 2-byte elements.
    assert seconds(DECODE, 4, all_reduce_s=1.0) == pytest.approx(4.0)
    assert seconds(DECODE, 4, link_bandwidth=2.0) == pytest.approx(4 * 1.5 * 3 * 8 * 2 / 2.0)
    assert seconds(DECODE, 1, all_reduce_s=1.0) == pytest.approx(0.0)


def test_a_step_without_rows_only_moves_blocks() -> None:
    block_bytes = 16 * 2 * 2 * 1 * 4 * 2
    swap = StepWork(0, 0, 0, 0, 0, num_moved_blocks=3)
    moved = seconds(swap, host_bandwidth=8.0, block_copy_s=0.25, step_s=9.0)
    assert moved == pytest.approx(3 * (block_bytes / 8 + 0.25))
    copy = StepWork(0, 0, 0, 0, 0, num_copied_blocks=2)
    assert seconds(copy, memory_bandwidth=8.0) == pytest.approx(2 * 2 * block_bytes / 8)


@pytest.mark.parametrize(
    ("source", "hardware", "kv_gigabytes", "bytes_per_token"),
    [
        ("dummy:opt-13b", "a100-40gb", 12, 819_200),
        ("dummy:opt-66b", "4x-a100-40gb", 21, 2_359_296),
        ("dummy:opt-175b", "8x-a100-80gb", 264, 4_718_592),
    ],
)
def test_the_papers_table_1(source: str, hardware: str, kv_gigabytes: float, bytes_per_token: int) -> None:
    """The pool that is left beside the weights is about the paper's, from shapes and memory alone."""
    model = StepTimeModel(open_checkpoint(source).model_config(), find_hardware(hardware), block_size=16)
    assert model.kv_bytes_per_token == bytes_per_token
    assert model.num_affordable_blocks(0.95) * model.block_bytes / 1e9 == pytest.approx(kv_gigabytes, rel=0.25)


@pytest.mark.parametrize(
    ("batch", "context", "rate", "prompt", "output"),
    [(30, 497, 2.0, 161, 338), (132, 85, 30.0, 19, 58.45)],
)
def test_opt_13b_is_no_faster_than_the_paper_saw_and_not_much_slower(
    batch: int, context: int, rate: float, prompt: int, output: float
) -> None:
    """Fig. 13: so many requests were batched at these rates, which were served at most that fast; prompts included.

    Half as slow again is what the costs chosen for the ratios of Fig. 12 and 14 mean for ShareGPT (hardware.py).
    """
    model = StepTimeModel(open_checkpoint("dummy:opt-13b").model_config(), find_hardware("a100-40gb"), block_size=16)
    num_tokens = batch + round(batch / output * prompt)  # as many prompts start as sequences end
    seconds = model.seconds(StepWork(batch, num_tokens, batch, batch * context, batch * context))
    assert 1.0 <= seconds * rate * output / batch <= 1.5


@pytest.mark.parametrize("field", ["memory_bandwidth", "matrix_flops", "num_devices", "step_s"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_senseless_hardware_is_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(FREE, **{field: value})  # type: ignore[arg-type]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"a100-40gb.*h200"):
        find_hardware("a100")
    assert all(hardware.source and name == hardware.name for name, hardware in HARDWARE.items())
